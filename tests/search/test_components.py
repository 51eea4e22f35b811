"""The library of components, and what a user may give in its place."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.search import components
from tests.fixtures.evolving import SLOTS


def test_the_built_in_library_has_every_category() -> None:
    found = components.read_library(None, built_in=True)
    assert list(found) == ["role", "tone", "rules", "safety", "format", "examples"]
    assert all(len(each) >= 4 for each in found.values())
    every = [text for texts in found.values() for text in texts]
    assert len(every) == len(set(every)) and all(text == text.strip() for text in every)


def test_components_of_the_user_come_beside_or_alone(tmp_path: Path) -> None:
    own = {"tone": ("Sing.", "Be direct, without small talk."), "pirate": ("Say arr.",)}
    both = components.read_library(own, built_in=True)
    assert both["pirate"] == ("Say arr.",) and both["tone"][-1] == "Sing."
    assert len(set(both["tone"])) == len(both["tone"])
    assert components.read_library(own, built_in=False) == own
    (tmp_path / "own.yaml").write_text("pirate:\n  - Say arr.\n", encoding="utf-8")
    read = components.read_library(str(tmp_path / "own.yaml"), built_in=False)
    assert read == {"pirate": ("Say arr.",)}
    assert components.digest(read) != components.digest(both)
    assert components.read_library(None, built_in=False) == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- Be kind.", "no mapping"),
        ("tone: Be kind.", "search.components.tone is no list"),
        ("tone: []", "is empty"),
        ("tone: [1]", "search.components.tone.0 is no text"),
        ("tone: ['  ']", "blank"),
        ("1: [Be kind.]", "no word"),
        ("tone: [Be kind.", "line 1"),
        ("", "no mapping"),
        (f"tone: [{'a' * 5000}]", "5000 characters"),
    ],
)
def test_a_file_that_holds_something_else_is_one_sentence(
    tmp_path: Path, content: str, says: str
) -> None:
    (tmp_path / "own.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=says) as error:
        components.read_library(str(tmp_path / "own.yaml"), built_in=True)
    assert "own.yaml" in str(error.value)


@pytest.mark.parametrize("name", ["missing.yaml", ".", "bytes.yaml"])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"search\.components"):
        components.read_library(str(tmp_path / name), built_in=True)


@pytest.mark.parametrize(
    "given", [{}, [], "tone", {"tone": "Be kind."}, {"": ["a"]}, {"a": [None]}]
)
def test_a_mapping_of_something_else_is_refused(given: Any) -> None:
    with pytest.raises(InputError):
        components.checked(given)


@pytest.mark.parametrize("seed", range(20))
def test_an_exchange_stays_in_its_category(seed: int) -> None:
    draw = random.Random(seed)
    text = f"{SLOTS['slot0'][0]} {SLOTS['slot3'][2]} And more."
    made = components.exchange(text, SLOTS, draw)
    assert made is not None and made.endswith("And more.")
    assert made.startswith("Part 0") and "Part 3" in made and made != text
    assert components.exchange("Nothing known.", SLOTS, draw) is None


@pytest.mark.parametrize("seed", range(20))
def test_what_is_added_is_of_a_category_that_was_missing(seed: int) -> None:
    draw = random.Random(seed)
    text = " ".join(SLOTS[f"slot{i}"][0] for i in (0, 1, 3, 4))
    made = components.add(text, SLOTS, draw)
    assert made is not None and "Part 2" in made and len(made) > len(text)
    whole = " ".join(each[0] for each in SLOTS.values())
    assert len(components.add(whole, SLOTS, draw) or "") > len(whole)
    assert components.add(text, {}, draw) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_composition_has_one_of_a_category_at_most(seed: int) -> None:
    made = components.compose(SLOTS, random.Random(seed))
    assert made is not None
    assert all(made.count(f"Part {i}") <= 1 for i in range(5)) and made.count("Part") >= 1
    assert components.compose({}, random.Random(seed)) is None
