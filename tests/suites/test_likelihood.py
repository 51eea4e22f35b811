"""Log-probability of given answers, against whole conversations through the base itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.suites.likelihood import GivenAnswer, likelihoods, rolling_likelihoods, windows
from rlprompt.types import Query
from tests.fixtures.runs import queries, tiny_policy
from tests.fixtures.tiny import tiny_model

ANSWERS = ("the sun", "a hand and the land", "in")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy("llama", torch.float64)


def turns(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


@torch.no_grad()
def whole(policy: Policy, text: str, user: str, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of every token after a conversation, by the model as it was loaded."""
    before = [*policy.head_ids, *policy.slot_ids(text), *policy.tail_ids(turns(user))]
    tokens = torch.tensor([[*before, *ids]])
    model = tiny_model("llama", torch.float64)
    logits = model(input_ids=tokens).logits[0, len(before) - 1 : -1]
    table: torch.Tensor = logits.double().log_softmax(dim=1)
    return table


@pytest.mark.parametrize("budget", [20, 5000])
def test_they_are_those_of_the_whole_conversation(policy: Policy, budget: int) -> None:
    prompt = TextPrompt("the rain and the sun")
    given = [GivenAnswer(turns(user), text) for user in ("he is", "she") for text in ANSWERS]
    found = likelihoods(policy, prompt, given, budget)
    for each, result in zip(given, found, strict=True):
        ids = policy.slot.completion_ids(each.text)[:-1]
        table = whole(policy, prompt.init_text, each.turns[0]["content"], ids)
        expected = table.gather(1, torch.tensor(ids)[:, None]).sum()
        assert result.logprob == pytest.approx(float(expected), abs=1e-8)
        assert result.is_greedy == (table.argmax(dim=1).tolist() == ids)


def test_what_greedy_decoding_gives_is_greedy(policy: Policy) -> None:
    engine = NativeEngine(policy)
    engine.sync(policy.prompt)
    sampling = SamplingSettings(temperature=0.0, max_tokens=4)
    (group,) = engine.generate(queries(1), 1, sampling, seed=0).groups
    text = group.completions[0].text
    again = policy.slot.completion_ids(text)[:-1]
    if tuple(again) == group.completions[0].token_ids[: len(again)] and text.strip():
        given = [GivenAnswer(group.query.messages, text)]
        assert likelihoods(policy, policy.prompt, given, 500)[0].is_greedy
    assert not likelihoods(
        policy, policy.prompt, [GivenAnswer(group.query.messages, "the question there")], 500
    )[0].is_greedy


@pytest.mark.parametrize("kind", ["soft", "none", "text"])
def test_a_begun_answer_is_not_scored(policy: Policy, kind: str) -> None:
    prompts: dict[str, Prompt] = {
        "soft": policy.prompt,
        "none": NonePrompt(),
        "text": TextPrompt("a"),
    }
    both = GivenAnswer(turns("rain"), "the sun and the land")
    begun = GivenAnswer(turns("rain"), "the sun")
    rest = GivenAnswer(turns("rain"), " and the land", begun="the sun")
    one, first, second = likelihoods(policy, prompts[kind], [both, begun, rest], 500)
    assert first.logprob + second.logprob == pytest.approx(one.logprob, abs=1e-9)
    assert second.logprob < 0


def test_nothing_has_log_probability_zero(policy: Policy) -> None:
    empty, blank = likelihoods(
        policy, policy.prompt, [GivenAnswer(turns("rain"), text) for text in ("", " \n")], 500
    )
    assert tuple(empty) == tuple(blank) == (0.0, True)
    assert likelihoods(policy, policy.prompt, [], 500) == []
    assert rolling_likelihoods(policy, policy.prompt, ["", "sun"], 500)[0] == 0.0


@pytest.mark.parametrize("room", [2, 3, 7, 10, 40])
@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 31])
def test_windows_score_each_token_once_with_the_one_before_it(room: int, count: int) -> None:
    ids = list(range(count))
    scored: list[int] = []
    parts = list(windows(ids, room))
    for place, (own, first) in enumerate(parts):
        assert len(own) <= room and list(own) == list(range(own[0], own[0] + len(own)))
        assert (first == 0) == (place == 0)
        scored += own[first:]
    assert scored == ids
    if len(parts) > 1:
        assert len(parts[-1][0]) == room  # as much context as there is room for


def test_rolling_is_the_sum_over_a_text_and_over_its_windows(policy: Policy) -> None:
    text = "the rain and the sun and the hand"
    alone = likelihoods(policy, policy.prompt, [GivenAnswer(turns(""), text)], 500)[0].logprob
    assert rolling_likelihoods(policy, policy.prompt, [text], 500) == [
        pytest.approx(alone, abs=1e-9)
    ]
    most = policy.forward.max_positions
    long = "the rain and the sun " * (most // 4)
    assert len(policy.slot.completion_ids(long)) > most
    (found,) = rolling_likelihoods(policy, policy.prompt, [long], 5000)
    assert found < 100 * alone / 10 < 0


def test_a_request_that_is_too_long_is_named(policy: Policy) -> None:
    long = GivenAnswer(turns("rain " * policy.forward.max_positions), "sun")
    with pytest.raises(InputError, match="request 1 needs"):
        likelihoods(policy, policy.prompt, [GivenAnswer(turns("a"), "b"), long], 500)


def test_a_query_in_a_batch_is_scored_as_alone(policy: Policy) -> None:
    given = [GivenAnswer(q.messages, a) for q in queries(4) for a in ANSWERS]
    together: list[Any] = likelihoods(policy, policy.prompt, given, 60)
    for each, result in zip(given, together, strict=True):
        (alone,) = likelihoods(policy, policy.prompt, [each], 60)
        assert result.logprob == pytest.approx(alone.logprob, abs=1e-9)
    assert isinstance(queries(1)[0], Query)
