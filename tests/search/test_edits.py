"""Edits of texts: they keep what they do not change, and say when there is nothing to edit."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from rlprompt.search import edits

TEXT = 'Be brief. Say "yes!" or "no."\nUse plain words; avoid 3.5 lists. '
PLAIN = (edits.delete, edits.swap, edits.repeat)


@pytest.mark.parametrize(
    "text", [TEXT, "", "one", "No end\n\nTwo.", "短い文。もう一つ。", "a.b.c. d", "...", "?! what"]
)
def test_the_phrases_of_a_text_are_the_text(text: str) -> None:
    assert "".join(edits.phrases(text)) == text


def test_phrases_are_sentences_and_lines() -> None:
    found = [each.strip() for each in edits.phrases(TEXT)]
    assert found == [
        "Be brief.", 'Say "yes!"', 'or "no."', "Use plain words;", "avoid 3.5 lists.",
    ]  # fmt: skip
    assert len(edits.phrases("短い文。もう一つ。")) == 2


def words(text: str) -> Counter[str]:
    return Counter(text.split())


@pytest.mark.parametrize("seed", range(20))
def test_edits_of_phrases_keep_the_words_of_the_others(seed: int) -> None:
    before = words(TEXT)
    deleted, swapped, repeated = (edit(TEXT, random.Random(seed)) for edit in PLAIN)
    assert deleted and not words(deleted) - before and words(deleted) != before
    assert swapped and words(swapped) == before
    assert repeated and not before - words(repeated) and words(repeated) != before


@pytest.mark.parametrize("seed", range(20))
def test_one_phrase_is_edited_word_by_word(seed: int) -> None:
    deleted = edits.delete("be very brief", random.Random(seed))
    assert deleted in ("very brief", "be brief", "be very")
    assert edits.swap("be very brief", random.Random(seed)) in ("very be brief", "be brief very")


def test_one_word_cannot_be_edited_away() -> None:
    draw = random.Random(0)
    assert edits.delete("brief", draw) is None
    assert edits.swap("brief", draw) is None
    assert edits.change_word("brief", ["other words"], draw) is None
    assert edits.repeat("", draw) is None
    assert edits.substitute("A.", [], draw) is None
    assert edits.cross("", "A.", draw) is None


@pytest.mark.parametrize("seed", range(20))
def test_what_is_taken_from_others_comes_from_them(seed: int) -> None:
    draw = random.Random(seed)
    made = edits.substitute("One. Two. Three.", ["Four. Five."], draw)
    assert made is not None
    assert sum(each in made for each in ("Four.", "Five.")) == 1
    assert sum(each in made for each in ("One.", "Two.", "Three.")) == 2
    changed = edits.change_word("alpha beta gamma", ["delta"], draw)
    assert changed is not None and words(changed) - words("alpha beta gamma delta") == Counter()


@pytest.mark.parametrize("seed", range(20))
def test_crossing_takes_each_phrase_from_either(seed: int) -> None:
    made = edits.cross("A1. A2. A3.", "B1. B2. B3.", random.Random(seed))
    assert made is not None
    for place, phrase in enumerate(made.split(), start=1):
        assert phrase in (f"A{place}.", f"B{place}.")
    other = edits.cross("A1. A2. A3.", "B1.", random.Random(seed))
    assert other is None or set(other.split()) <= {"A1.", "A2.", "A3.", "B1."}


def test_phrases_never_run_into_each_other() -> None:
    assert edits.joined(["One.", "Two.\n", "Three."]) == "One. Two.\nThree."
    assert edits.joined(["短い文。", "もう一つ。"]) == "短い文。もう一つ。"
    assert edits.tidy("  a   b \n\n\n\n c\t") == "a b\n\nc"
