"""Recipes that someone might write to do harm, or by a slip: one sentence each, and soon."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.fuzzing.texts import GOOD, INVALID_OVERRIDES, INVALID_RECIPES
from rlprompt.errors import InputError
from rlprompt.recipe.schema import load_recipe


def sentence(path: Path, *overrides: str) -> str:
    begun = time.process_time()
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    assert time.process_time() - begun < 20
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert 20 < len(text) < 1500
    return text


@pytest.mark.parametrize("name", sorted(INVALID_RECIPES))
def test_a_recipe_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(INVALID_RECIPES[name])
    text = sentence(path)
    assert "recipe.yaml" in text or "template" in text


@pytest.mark.parametrize("place", range(len(INVALID_OVERRIDES)))
def test_an_override_is_refused(tmp_path: Path, place: int) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    assert "override" in sentence(path, INVALID_OVERRIDES[place]) or "template" in sentence(
        path, INVALID_OVERRIDES[place]
    )


def test_a_pipe_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    assert "named pipe" in sentence(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "name", ["..", ".", " x", "x ", "a\0b", "a\nb", "\u2028", "a" * 200, "\x1b[31m"], ids=ascii
)
def test_a_name_that_folders_and_logs_cannot_carry_is_refused(tmp_path: Path, name: str) -> None:
    from rlprompt.recipe.schema import recipe_of_tree

    tree = {
        "name": name,
        "data": {"rows": ["a", "b", "c"]},
        "rewards": [{"path": "builtin:length", "options": {"max": 4}}],
    }
    with pytest.raises(InputError, match="'name'"):
        recipe_of_tree(tree, tmp_path, lambda place: "tree")
    tree["name"] = "Rain & sun, \u00fc 2"
    assert recipe_of_tree(tree, tmp_path, lambda place: "tree").name == tree["name"]


def test_an_integer_without_a_bound_of_its_own_has_one(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    for key in ("training.steps", "training.save_every", "data.shuffle_seed"):
        assert "at most 2147483647" in sentence(path, f"{key}=2147483648")
    assert load_recipe(path, ["training.steps=2147483647"]).training.steps == 2**31 - 1


def test_a_text_that_looks_like_a_number_survives_the_resolved_recipe(tmp_path: Path) -> None:
    from rlprompt.reading import yaml_text

    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD.replace("name: x", "name: '1e3'"))
    recipe = load_recipe(path)
    (tmp_path / "again.yaml").write_text(yaml_text.dump(recipe.plain()))
    assert load_recipe(tmp_path / "again.yaml") == recipe
