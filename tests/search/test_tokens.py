"""Search among tokens: what it learns from, whom it keeps, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlprompt.engines.native import NativeEngine
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.runs.learner import LearnerState
from rlprompt.search.base import Candidate, SearchStart, Trial
from rlprompt.search.standings import Contender, best_by_margin, ranked
from rlprompt.search.tokens import Tokens, TokensSettings, drawn_completions
from rlprompt.types import Group
from tests.fixtures.runs import completion, queries, tiny_policy
from tests.fixtures.searches import trial

POLICY: Policy = tiny_policy()
TEXT = "the rain and the sun"
FEW: dict[str, Any] = {"candidates": 2, "substitutions": 4, "rounds": 1, "top_k": 16}


def search(prompt: Prompt | None = None, **settings: Any) -> Tokens:
    given = SearchStart(prompt or TextPrompt(TEXT), 0, NativeEngine(POLICY), queries(4))
    return Tokens.make(TokensSettings(**(FEW | settings)), given)


def told(candidate: Candidate, rewards: Sequence[float], first: int = 0) -> Trial:
    """One completion of one token per query, a token of its own for each reward."""
    made = trial(candidate, [[value] for value in rewards])
    groups = tuple(
        Group(replace(group.query, index=first + place), (completion(token_of(value), 2),))
        for place, (group, value) in enumerate(zip(made.groups, rewards, strict=True))
    )
    return replace(made, groups=groups)


def token_of(value: float) -> int:
    return 39 if math.isnan(value) else 40 + int(8 * value)


def step(searcher: Tokens, better: str = "", first: int = 0) -> list[str]:
    """One step in which a text that is named scores 1 and the others 0."""
    asked = searcher.ask()
    texts = [each.prompt.init_text for each in asked]
    searcher.tell(
        [told(c, [float(t == better)] * 2, first) for c, t in zip(asked, texts, strict=True)]
    )
    return texts


def test_candidates_are_texts_of_the_tokens_that_were_meant_and_no_text_comes_twice() -> None:
    searcher = search(candidates=3, grow=2, shrink=2, survivors=0)
    length = len(POLICY.slot_ids(TEXT))
    seen: list[str] = []
    for number in range(4):
        texts = step(searcher, first=2 * number)
        assert texts[0] == TEXT and len(texts) == 4
        for text in texts[1:]:
            ids = POLICY.slot_ids(text)
            assert POLICY.decode(ids) == text and length - 2 <= len(ids) <= length + 2
        seen += texts[1:]
    assert len(set(seen)) == len(seen) == 12
    assert searcher.metrics["forwards"] > 0 and searcher.metrics["prompt_tokens"] == length


def test_the_length_stays_by_default() -> None:
    texts = step(search())
    assert {len(POLICY.slot_ids(text)) for text in texts} == {len(POLICY.slot_ids(TEXT))}


def test_what_scores_more_replaces_the_incumbent_and_one_survives() -> None:
    searcher = search()
    better = searcher.ask()[1].prompt.init_text
    step(searcher, better)
    assert searcher.incumbent.prompt.init_text == better
    asked = searcher.ask()
    assert asked[0].id == 1 and asked[1].id in (0, 2) and len(asked) == 4
    assert all(each.parents == (1,) and each.origin == "substituted" for each in asked[2:])


def test_completions_of_all_candidates_are_pooled_and_equal_ones_are_one() -> None:
    one, other = (Candidate(number, TextPrompt("x")) for number in range(2))
    found = drawn_completions([told(one, [1.0, 0.5]), told(other, [0.0, 0.5])])
    assert found is not None
    assert [len(group.completions) for group in found.groups] == [2]  # the second says nothing
    assert torch.allclose(found.weights, torch.tensor([1.0, -1.0]).double() * 2**0.5 * 2 / 4)
    assert torch.equal(found.sampling_logprobs, torch.tensor([-1.0, -1.0]).double())
    assert drawn_completions([told(one, [0.5, math.nan]), told(other, [0.5, 0.5])]) is None


def test_where_rewards_do_not_differ_candidates_are_drawn() -> None:
    searcher = search(survivors=0)
    step(searcher)
    assert searcher.metrics["backwards"] == 0
    assert {each.origin for each in searcher.ask()[1:]} == {"drawn"}


def contender(number: int, rewards: Sequence[float]) -> Contender:
    return Contender(Candidate(number, TextPrompt(f"{number}")), (1,), {0: list(rewards)})


def test_a_margin_in_standard_errors_keeps_luck_out() -> None:
    held = contender(0, [0.5, 0.5, 0.5, 0.5])
    lucky, sure = contender(1, [1.0, 0.2, 0.9, 0.1]), contender(2, [0.6, 0.6, 0.6, 0.5])
    assert best_by_margin(held, [lucky], 1.0) is None
    assert best_by_margin(held, [lucky, sure], 1.0) is sure
    assert best_by_margin(held, [contender(3, [math.nan] * 4)], 0.0) is None
    assert [c.candidate.id for c in ranked(held, [contender(3, [math.nan] * 4), lucky, sure])] == [
        2,
        1,
        3,
    ]


def test_only_steps_that_both_were_tried_in_are_compared() -> None:
    one, other = contender(0, [0.0, 0.0]), contender(1, [1.0, math.nan])
    other.rewards[1] = [9.0, 9.0]
    assert other.gain_over(one) == (1.0, 0.0)
    assert math.isnan(Contender(other.candidate, (1,), {5: [1.0]}).gain_over(one).mean)


def test_by_evidence_many_queries_decide_and_the_data_ends_it() -> None:
    searcher = search(evidence={"spread": 1.0, "min_effect": 0.5})
    better = searcher.ask()[1].prompt.init_text
    for number in range(12):
        step(searcher, better, first=2 * number)
        state = searcher.state()
        assert json.loads(json.dumps(state.plain)) == state.plain
        if searcher.incumbent.prompt.init_text == better:
            break
    assert 2 < number < 12 and not searcher.is_over
    step(searcher, better, first=0)
    assert searcher.is_over


def test_a_spread_that_does_not_hold_ends_the_run() -> None:
    searcher = search(evidence={"spread": 1.0})
    asked = searcher.ask()
    with pytest.raises(InputError, match=r"search\.evidence\.spread does not hold"):
        searcher.tell([told(c, [3.0 * c.id] * 2) for c in asked])


def test_a_soft_start_is_its_nearest_text() -> None:
    soft = SoftPrompt(POLICY.embed(POLICY.slot_ids(TEXT)), "whatever")
    searcher = search(soft)
    assert searcher.incumbent.prompt.kind == "text"
    assert searcher.incumbent.prompt.init_text == TEXT
    assert search(soft, projection="l2").incumbent.prompt.init_text == TEXT


def test_given_answers_are_learned_from_at_once() -> None:
    rows = [replace(query, columns={"answer": "she is"}) for query in queries(4)]
    given = SearchStart(TextPrompt(TEXT), 0, NativeEngine(POLICY), rows)
    searcher = Tokens.make(TokensSettings(**FEW, target_column="answer"), given)
    assert {each.origin for each in searcher.ask()[1:]} == {"substituted"}
    assert searcher.metrics["backwards"] == 4
    step(searcher)
    assert searcher.metrics["backwards"] == 6  # the step's two queries


def test_another_search_is_not_gone_on_with() -> None:
    state = search().state()
    with pytest.raises(ValueError, match="from another text"):
        search(TextPrompt("the hand")).restore(state)
    with pytest.raises(ValueError, match="by another rule"):
        search(evidence={}).restore(LearnerState({}, state.plain))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"projection": "l2"}, r"search\.projection is for a search that starts from a soft"),
        ({"shrink": 500}, r"search\.shrink is 500, .* nothing would be left"),
        ({"target_column": "answer"}, r"search\.target_column is 'answer', which query 0 does not"),
    ],
)
def test_settings_that_do_not_fit_the_start_are_refused(
    settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        search(**settings)


def test_without_the_weights_of_the_base_there_is_no_gradient() -> None:
    with pytest.raises(InputError, match="needs the weights of the base"):
        Tokens.make(TokensSettings(), SearchStart(TextPrompt(TEXT), 0))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"evidence": {}, "margin": 1.0}, "margin is for a search without evidence"),
        ({"evidence": {}, "survivors": 2}, "survivors is for a search without evidence"),
        ({"target_column": "a", "clip": 0.2}, "clip is for drawn completions"),
        ({"candidates": 0}, "greater than or equal to 1"),
        ({"clip": 1.0}, "less than 1"),
        ({"fluency_weight": -1.0}, "greater than or equal to 0"),
        ({"projection": "dot"}, "cosine"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        TokensSettings(**settings)
