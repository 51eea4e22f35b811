"""Words that YAML 1.1 reads as truth values: a field that has one of them gets it back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import ValidationError

from rlprompt.errors import InputError
from rlprompt.model.base import ModelSettings
from rlprompt.recipe.schema import Recipe, load_recipe
from rlprompt.settings import Settings

GOOD = "name: x\ndata: {rows: [a, b]}\nrewards: [{path: 'builtin:length'}]\n"


class Words(Settings):
    """Every kind of place."""

    one: Literal["auto", "on", "off"] = "auto"
    """One."""
    other: Literal["yes", "no"] | None = None
    """May be nothing."""
    several: tuple[Literal["on", "off"], ...] = ()
    """Several."""
    flag: bool = False
    """A truth value."""
    free: Literal["a", "b"] = "a"
    """Of no such words."""


@pytest.mark.parametrize("word", ["on", "off", "'on'", "'off'", "ON", "Off", "auto"])
def test_the_kernels_can_be_switched_by_word(tmp_path: Path, word: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    meant = word.strip("'").lower()
    by_override = load_recipe(path, [f"model.cpu_kernels={word}"])
    assert by_override.model.cpu_kernels == meant
    path.write_text(GOOD + f"model: {{cpu_kernels: {word}}}\n")
    assert load_recipe(path).model.cpu_kernels == meant
    again = Recipe(**yaml.safe_load(yaml.safe_dump(by_override.plain())))
    assert again.model.cpu_kernels == meant


def test_words_in_every_kind_of_place() -> None:
    made = Words(one=False, other=True, several=(True, False), flag=True)  # type: ignore[arg-type]
    assert (made.one, made.other, made.several) == ("off", "yes", ("on", "off"))
    assert made.flag is True
    assert Words(other=False).other == "no"  # type: ignore[arg-type]
    assert Words(other=None).other is None


@pytest.mark.parametrize(
    "wrong", [{"one": None}, {"one": 0}, {"one": 1}, {"free": True}, {"flag": "on"}], ids=str
)
def test_nothing_else_is_taken_for_a_word(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Words(**wrong)


def test_a_wrong_word_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    with pytest.raises(InputError, match=r"'model.cpu_kernels' is 'offf'; did you mean 'off'"):
        load_recipe(path, ["model.cpu_kernels=offf"])


def words_of(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from (each for each in node.get("enum", ()) if isinstance(each, str))
        yield from (each for each in [node.get("const")] if isinstance(each, str))
        for child in node.values():
            yield from words_of(child)
    elif isinstance(node, list):
        for child in node:
            yield from words_of(child)


def test_every_word_of_a_recipe_survives_yaml_or_is_given_back() -> None:
    read = {
        word: yaml.safe_load(word) for word in sorted(set(words_of(Recipe.model_json_schema())))
    }
    changed = {word for word, value in read.items() if value != word}
    assert changed == {"on", "off"}
    assert set(words_of(ModelSettings.model_json_schema())) >= changed
