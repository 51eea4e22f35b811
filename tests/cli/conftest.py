"""A tiny model on disk, and one finished run of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.runs import rlprompt, write_recipe
from tests.fixtures.tiny import save_tiny


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def finished(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; its recipe is `recipe.yaml` beside it. Not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, model_dir)
    shown = rlprompt("train", recipe, "--output", folder / "run")
    assert shown.code == 0, shown.err
    (folder / "shown.txt").write_text(shown.out)
    return folder / "run"
