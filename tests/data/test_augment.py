"""Augmentation: what is asked changes, and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from rlprompt.data.augment import Augmenter, AugmentList, AugmentSettings, samples
from rlprompt.data.situations import SITUATIONS
from rlprompt.errors import InputError
from rlprompt.types import Query, Surroundings

QUERIES = [
    Query(({"role": "user", "content": f"question {i} of many"},), {"answer": i}, index=i)
    for i in range(400)
]
OVERRIDE = {"type": "frame", "frames": "override"}


def entries(*given: dict[str, Any]) -> tuple[AugmentSettings, ...]:
    found: tuple[AugmentSettings, ...] = TypeAdapter(AugmentList).validate_python(given)
    return found


def asked(settings: tuple[AugmentSettings, ...], seed: int = 4) -> list[Query]:
    augment = Augmenter(settings, QUERIES)
    return [augment(query, seed) for query in QUERIES]


def test_shares_of_the_queries_are_asked_in_each_situation_and_the_rest_as_it_is() -> None:
    both = entries(
        {"situation": OVERRIDE, "share": 0.3},
        {"situation": {"type": "misspelt", "share": 1.0}, "share": 0.5},
    )
    found = asked(both)
    counts = Counter(query.situation for query in found)
    assert counts.keys() == {"override", "misspelt", "plain"}
    assert 90 < counts["override"] < 150 and 160 < counts["misspelt"] < 240
    for now, before in zip(found, QUERIES, strict=True):
        assert (now.index, now.columns) == (before.index, before.columns)
        assert (now.messages == before.messages) == (now.situation == "plain")
        if now.situation == "override":
            assert before.text in now.text
    assert asked(both) == found != asked(both, seed=5)


@pytest.mark.parametrize("shares", [(1.0,), (0.7, 0.2, 0.1), (0.1,) * 10, (0.3, 0.3, 0.4)])
def test_shares_of_one_together_leave_no_plain_query(shares: tuple[float, ...]) -> None:
    given = [
        {"situation": {**OVERRIDE, "name": f"n{i}"}, "share": share}
        for i, share in enumerate(shares)
    ]
    found = Counter(query.situation for query in asked(entries(*given)))
    assert found.keys() == {f"n{i}" for i in range(len(shares))}


def test_a_query_does_not_depend_on_the_others_and_frames_vary() -> None:
    settings = entries({"situation": OVERRIDE, "share": 1.0})
    whole = asked(settings)
    alone = Augmenter(settings, QUERIES[:1])
    assert alone(QUERIES[7], 4) == whole[7]
    assert len({query.text.replace(str(query.index), "") for query in whole}) > 2
    assert len({alone(QUERIES[7], seed).text for seed in range(20)}) > 2


@pytest.mark.parametrize("name", ["frame", "paraphrase", "misspelt", "long_context", "earlier"])
def test_every_situation_that_changes_the_turns_can_be_trained_in(name: str) -> None:
    situation = OVERRIDE if name == "frame" else {"type": name}
    settings = entries({"situation": situation, "share": 1.0})
    found = Augmenter(settings, QUERIES)(QUERIES[3], 1)
    assert found.messages != QUERIES[3].messages
    assert found.messages[-1]["role"] == "user"
    assert len(list(samples(settings, QUERIES[3], 5))) == 5


def test_frames_stand_around_the_prompt_and_leave_the_conversation_alone() -> None:
    settings = entries({"situation": {"type": "system_frame"}, "share": 0.5})
    found = asked(settings)
    framed = [query for query in found if query.around is not None]
    assert 150 < len(framed) < 250
    assert {query.situation for query in framed} == {"system_frame"}
    assert [query.messages for query in found] == [query.messages for query in QUERIES]
    around = {query.around for query in framed}
    assert around == set(settings[0].situation.places) and len(around) > 4
    assert all(each is not None and each.is_frame for each in around)
    assert asked(settings) == found != asked(settings, seed=5)


def test_other_system_text_belongs_to_reference_and_teacher_too() -> None:
    system = {"type": "system", "before": "Today is Monday. ", "after": "\nBe kind."}
    (query,) = (
        Augmenter(entries({"situation": system, "share": 1.0}), QUERIES)(each, 0)
        for each in QUERIES[:1]
    )
    assert query.around == Surroundings("Today is Monday.", "Be kind.", is_frame=False)


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "sum": (
        [{"situation": OVERRIDE, "share": 0.6}, {"situation": {"type": "earlier"}, "share": 0.5}],
        "the shares add up to 1.1",
    ),
    "twice": ([{"situation": OVERRIDE}, {"situation": OVERRIDE}], "two are called 'override'"),
    "plain": ([{"situation": {**OVERRIDE, "name": "plain"}}], "two are called 'plain'"),
    "slash": ([{"situation": {**OVERRIDE, "name": "a/b"}}], "holds a slash"),
    "none": ([{"situation": OVERRIDE, "share": 0.0}], "greater than 0"),
    "much": ([{"situation": OVERRIDE, "share": 1.5}], "less than or equal to 1"),
    "true": ([{"situation": OVERRIDE, "share": True}], "valid number"),
    "missing": ([{"share": 0.5}], "situation\n  Field required"),
    "unknown": ([{"situation": OVERRIDE, "shares": 0.5}], "Extra inputs"),
    "inner": ([{"situation": {**OVERRIDE, "words": 3}}], "Extra inputs"),
    "bare": ([{"situation": {"type": "frame", "texts": ["{query}"]}}], "nothing beside"),
    "dialogue": ([{"situation": {"type": "dialogue"}}], "needs answers of the model"),
    "no prompt": ([{"situation": {"type": "system_frame", "texts": ["Be"]}}], "{prompt} 0 times"),
    "two prompts": (
        [{"situation": {"type": "system_frame", "texts": ["Be {prompt}", "{prompt} or {prompt}"]}}],
        r"texts\[1\] holds {prompt} 2 times",
    ),
    "bare prompt": (
        [{"situation": {"type": "system_frame", "texts": [" {prompt}\n"]}}],
        "nothing beside {prompt}",
    ),
    "no texts": ([{"situation": {"type": "system_frame", "texts": []}}], "at least 1 item"),
    "sampling": ([{"situation": {"type": "sampling", "top_k": 2}}], "drawn in one way"),
    "quantised": ([{"situation": {"type": "quantised"}}], "a second base"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_effect_or_no_meaning_is_refused(name: str) -> None:
    given, sentence = REFUSED[name]
    with pytest.raises(ValidationError, match=sentence):
        entries(*given)


def test_every_situation_can_be_trained_in_or_is_refused_with_a_reason() -> None:
    refused = {name for name in REFUSED if name in SITUATIONS}
    trained = {"frame", "paraphrase", "misspelt", "long_context", "earlier", "system"}
    assert refused | trained == SITUATIONS.keys() and not refused & trained


def test_a_situation_that_changes_no_query_is_refused() -> None:
    short = [Query(({"role": "user", "content": "1 + 2 = ?"},), index=0)]
    settings = entries({"situation": {"type": "misspelt"}})
    with pytest.raises(InputError, match=r"augment\.0 \(misspelt\) leaves every training query"):
        Augmenter(settings, short)
    Augmenter(settings, [*short, QUERIES[0]])
