"""Situations: pure functions of a conversation and a seed."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from rlprompt.data.frames import frames, rows
from rlprompt.data.situations import (
    SITUATIONS,
    AnySituation,
    Earlier,
    Frame,
    LongContext,
    Misspelt,
    Paraphrase,
    Sampling,
    Situation,
)
from rlprompt.engines.sampling import SamplingSettings

QUERY = "Why does {this} bread rise in the oven?"
TALK = [{"role": "user", "content": QUERY}]
CHANGING: dict[str, Situation] = {
    "override": Frame(frames="override"),
    "injection": Frame(frames="injection"),
    "role_play": Frame(frames="role_play"),
    "german": Frame(frames="german"),
    "own": Frame(texts=["First. {query}", "{query} Last."]),
    "misspelt": Misspelt(share=1.0),
    "paraphrase": Paraphrase(),
    "long_context": LongContext(words=700),
    "earlier": Earlier(),
}


def parsed(value: Any) -> Situation:
    situation: Situation = TypeAdapter(AnySituation).validate_python(value)
    return situation


@pytest.mark.parametrize("name", CHANGING)
def test_a_situation_depends_on_conversation_and_seed_alone(name: str) -> None:
    situation = CHANGING[name]
    first = situation.asked(TALK, 3)
    situation.asked([{"role": "user", "content": "Another question in between"}], 3)
    assert situation.asked(TALK, 3) == first != TALK
    assert TALK == [{"role": "user", "content": QUERY}]
    assert first[-1]["role"] == "user"


@pytest.mark.parametrize(
    "name", ["override", "injection", "role_play", "german", "own", "long_context", "earlier"]
)
def test_the_question_stands_in_it_as_it_was(name: str) -> None:
    for seed in range(6):
        assert QUERY in CHANGING[name].asked(TALK, seed)[-1]["content"]


def test_seeds_take_different_frames() -> None:
    drawn = {Frame(frames="override").asked(TALK, seed)[-1]["content"] for seed in range(30)}
    assert len(drawn) == len(frames()["override"])


def test_a_share_of_the_long_words_is_misspelt_and_no_word_is_lost() -> None:
    for seed in range(20):
        text = Misspelt(share=0.5).asked(TALK, seed)[-1]["content"]
        pairs = list(zip(QUERY.split(" "), text.split(" "), strict=True))
        changed = [(old, new) for old, new in pairs if old != new]
        assert 1 <= len(changed) <= 2
        assert all(old[0] == new[0] and abs(len(old) - len(new)) <= 1 for old, new in changed)


def test_long_context_has_the_words_asked_for() -> None:
    text = LongContext(words=500).asked(TALK, 0)[-1]["content"]
    assert len(text.split()) == 500 + len(f"These are my notes. My question is: {QUERY}".split())


def test_earlier_turns_come_first() -> None:
    talk = Earlier(turns=["a", "b"]).asked(TALK, 0)
    assert [turn["role"] for turn in talk] == ["user", "assistant", "user"]


def test_sampling_changes_what_is_named_only() -> None:
    plain = SamplingSettings(temperature=0.7, top_p=0.9, max_tokens=7)
    assert Sampling(temperature=0.0).sampled(plain) == plain.model_copy(update={"temperature": 0.0})


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"type": "frame"}, "exactly one of frames and texts"),
        ({"type": "frame", "frames": "override", "texts": ["{query}"]}, "exactly one of frames"),
        ({"type": "frame", "texts": ["no place"]}, "does not hold {query}"),
        ({"type": "system", "before": " "}, "both blank"),
        ({"type": "sampling"}, "nothing is changed"),
        ({"type": "dialogue", "turns": [3, 1]}, "ascending"),
        ({"type": "dialogue", "turns": [0]}, "ascending"),
        ({"type": "earlier", "turns": ["a", "b", "c"]}, "even number"),
        ({"type": "misspelt", "share": 0.0}, "greater than 0"),
        ({"type": "quantised", "bits": 3}, "4 or 8"),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else None,
)
def test_what_has_no_effect_or_sense_is_refused(value: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        parsed(value)


def test_names_in_results() -> None:
    assert parsed({"type": "frame", "frames": "french"}).label == "french"
    assert parsed({"type": "misspelt", "name": "typos"}).label == "typos"
    assert {each.model_fields["type"].default for each in SITUATIONS.values()} == SITUATIONS.keys()


def test_shipped_data_is_whole() -> None:
    listed = frames()
    for name in ("override", "injection", "role_play", "german", "french", "spanish", "jailbreak"):
        assert all("{query}" in frame for frame in listed[name])
    assert {row["set"] for row in rows("choices")} == {
        "facts", "misconceptions", "ambiguous", "opinion",
    }  # fmt: skip
    assert all(row["answer"] < len(row["options"]) for row in rows("choices"))
    queries = [row["query"] for name in ("exact", "general") for row in rows(name)]
    assert len(set(queries)) == len(queries)
