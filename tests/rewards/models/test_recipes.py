"""The safety recipes of this repository build, on a tiny base and a tiny preference model."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlprompt.errors import InputError
from rlprompt.recipe.build import build_run
from rlprompt.recipe.schema import load_recipe
from rlprompt.runs.run import Run
from tests.fixtures.classifiers import save_encoder
from tests.fixtures.tiny import save_tiny

FOLDER = Path(__file__).parents[3] / "recipes" / "safety"
RECIPES = [
    (f"smollm2_{algorithm}_{kind}.yaml", algorithm, kind)
    for algorithm in ("grpo", "ppo")
    for kind in ("preference", "constrained")
]


@pytest.mark.parametrize(("name", "algorithm", "kind"), RECIPES)
def test_it_builds(name: str, algorithm: str, kind: str, tmp_path: Path) -> None:
    overrides = [f"model.path={save_tiny(tmp_path / 'base')}", "model.device=cpu"]
    if kind == "preference":
        judge = save_encoder(tmp_path / "judge", template=True)
        overrides.append(f"rewards.0.options.path={judge}")
    recipe = load_recipe(FOLDER / name, overrides)
    run = build_run(recipe, FOLDER, tmp_path / "run")
    assert isinstance(run, Run)
    roles = [each.role for each in recipe.rewards]
    assert recipe.algorithm.type == algorithm
    assert roles.count("constraint") == (2 if kind == "constrained" else 0)


def test_it_says_how_to_make_a_preference_model_that_is_not_there(tmp_path: Path) -> None:
    overrides = [f"model.path={save_tiny(tmp_path / 'base')}", "model.device=cpu"]
    overrides.append(f"rewards.0.options.path={tmp_path / 'away' / 'model'}")
    recipe = load_recipe(FOLDER / "smollm2_grpo_preference.yaml", overrides)
    with pytest.raises(InputError, match="make it with `rlprompt reward train`"):
        build_run(recipe, FOLDER, tmp_path / "run")
