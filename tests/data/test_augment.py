"""Augmentation: what is asked changes, and nothing else."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from rlprompt.data.augment import Augmenter, LongContextSettings, OverrideSettings, WrapSettings
from rlprompt.types import Query

QUERIES = [
    Query(({"role": "user", "content": f"question {i}"},), {"answer": i}, index=i)
    for i in range(200)
]


def test_a_share_of_the_queries_is_changed_and_the_same_way_again() -> None:
    augment = Augmenter([WrapSettings(share=0.3, texts=("Hear this.",))], QUERIES)
    asked = [augment(query, seed=4) for query in QUERIES]
    changed = [a for a, query in zip(asked, QUERIES, strict=True) if a != query]
    assert 40 < len(changed) < 80
    assert all(a.text.startswith("Hear this.\n\nquestion ") for a in changed)
    for before, after in zip(QUERIES, asked, strict=True):
        assert (after.columns, after.index) == (before.columns, before.index)
    assert [augment(query, seed=4) for query in QUERIES] == asked
    assert [augment(query, seed=5) for query in QUERIES] != asked


def test_an_override_stands_before_or_after_the_query() -> None:
    augment = Augmenter([OverrideSettings(share=1.0, texts=("Forget it.",))], QUERIES)
    texts = [augment(query, seed=0).text for query in QUERIES]
    before = sum(text.startswith("Forget it.\n\n") for text in texts)
    after = sum(text.endswith("\n\nForget it.") for text in texts)
    assert before + after == len(QUERIES) and min(before, after) > 60


def test_a_long_context_adds_turns_and_keeps_the_query_last() -> None:
    augment = Augmenter([LongContextSettings(share=1.0, num_queries=7)], QUERIES)
    asked = augment(QUERIES[3], seed=0)
    assert [m["role"] for m in asked.messages] == ["user", "assistant", "user"]
    assert asked.messages[0]["content"].count("- question ") == 7
    assert asked.text == "question 3"


def test_augmentations_meet_in_one_query() -> None:
    both = (LongContextSettings(share=1.0), OverrideSettings(share=1.0, texts=("Forget it.",)))
    asked = Augmenter(both, QUERIES)(QUERIES[0], seed=1)
    assert len(asked.messages) == 3 and "Forget it." in asked.text


@pytest.mark.parametrize("texts", [(), ("fine", "  ")])
def test_texts_must_say_something(texts: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, match="texts holds no text"):
        WrapSettings(texts=texts)
