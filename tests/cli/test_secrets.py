"""A recipe with a secret in it is refused by every command that would write it somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.runs import rlprompt, write_recipe

SECRET = "hunter2hunter2"


@pytest.mark.parametrize("command", ["train", "submit", "plan"])
def test_a_secret_reaches_no_file_and_no_screen(
    command: str, model_dir: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, model_dir)
    arguments = [f"rewards.0.options.url=https://h/?key={SECRET}"]
    arguments += [] if command == "plan" else ["--output", str(tmp_path / "run")]
    shown = rlprompt(command, recipe, *arguments)
    assert shown.code == 2
    assert "'rewards.0.options.url' holds a value of 'key'" in shown.err
    assert SECRET not in shown.out + shown.err
    assert not (tmp_path / "run").exists()
