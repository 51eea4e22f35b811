"""How completions are packed into forwards changes no log-probability."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlprompt.prompts.text import TextPrompt
from rlprompt.rollout.packing import pack
from rlprompt.types import Query
from tests.fixtures.tiny import FAMILIES
from tests.invariants.oracle import (
    QUERIES,
    TEXT,
    completions,
    context_ids,
    flat,
    model_of,
    own_logprobs,
    policy_of,
    query,
    scores,
    soft_prompt,
)

GROUPS = [completions(5, 1, 14, seed=1), completions(1, 1, seed=2), completions(9, seed=3)]


def _alone(family: str, dtype: torch.dtype) -> list[list[Tensor]]:
    """Each (query, completion) in a forward of its own."""
    policy = policy_of(family, dtype)
    prompt = TextPrompt(TEXT)
    return [
        [flat(scores(policy, prompt, [asked], [[c]])) for c in group]
        for asked, group in zip(QUERIES, GROUPS, strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_rows_alone(family: str) -> None:
    policy = policy_of(family, torch.float64)
    packed = scores(policy, TextPrompt(TEXT), QUERIES, GROUPS)
    alone = [row for group in _alone(family, torch.float64) for row in group]
    torch.testing.assert_close(flat(packed), torch.cat(alone), rtol=0, atol=1e-10)
    assert (packed.logprobs[~packed.mask] == 0).all()
    assert (packed.entropy[~packed.mask] == 0).all()
    assert packed.mask.sum(1).tolist() == [5, 1, 14, 1, 1, 9]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_order_of_groups_and_rows_changes_nothing(family: str) -> None:
    policy = policy_of(family, torch.float64)
    order = [2, 0, 1]
    shuffled = [list(reversed(GROUPS[i])) for i in order]
    got = scores(policy, TextPrompt(TEXT), [QUERIES[i] for i in order], shuffled)
    alone = _alone(family, torch.float64)
    expected = [row for i in order for row in reversed(alone[i])]
    torch.testing.assert_close(flat(got), torch.cat(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("budget", [1, 30, 60, 10_000])
def test_micro_batch_cuts_change_nothing(family: str, budget: int) -> None:
    policy = policy_of(family, torch.float64)
    alone = _alone(family, torch.float64)
    prompt = TextPrompt(TEXT)
    lengths = [[len(c.token_ids) for c in group] for group in GROUPS]
    queries = [len(policy.query_ids(asked, prompt)) for asked in QUERIES]
    micros = pack(queries, lengths, budget)
    assert (len(micros) > 1) == (budget < 10_000)
    for micro in micros:
        got = scores(
            policy,
            prompt,
            [QUERIES[g] for g, _ in micro.rows],
            [[GROUPS[g][i] for i in places] for g, places in micro.rows],
        )
        expected = [alone[g][i] for g, places in micro.rows for i in places]
        torch.testing.assert_close(flat(got), torch.cat(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_completions_of_one_token_only(family: str) -> None:
    policy = policy_of(family, torch.float64)
    groups = [completions(1, 1, 1, seed=4), completions(1, seed=5), completions(1, seed=6)]
    got = scores(policy, TextPrompt(TEXT), QUERIES, groups)
    expected = [
        flat(scores(policy, TextPrompt(TEXT), [asked], [[c]]))
        for asked, group in zip(QUERIES, groups, strict=True)
        for c in group
    ]
    torch.testing.assert_close(flat(got), torch.cat(expected), rtol=0, atol=1e-10)


def test_a_group_without_completions_disturbs_no_other() -> None:
    policy = policy_of("gemma3", torch.float64)
    got = scores(policy, TextPrompt(TEXT), QUERIES, [GROUPS[0], [], GROUPS[2]])
    alone = _alone("gemma3", torch.float64)
    torch.testing.assert_close(flat(got), torch.cat(alone[0] + alone[2]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_a_window_shorter_than_every_part(family: str) -> None:
    """Prefix, query and completion are each longer than the window of 8."""
    policy = policy_of(family, torch.float64)
    text = "the rain and the sun and the hand and the land, and there she is"
    long = query("is she in here or is she out there with the men and the land?")
    group = completions(40, 9, 1, 17, seed=7)
    prompt = TextPrompt(text)
    packed = scores(policy, prompt, [long, QUERIES[1]], [group, group[:2]])
    alone = [flat(scores(policy, prompt, [long], [[c]])) for c in group]
    alone += [flat(scores(policy, prompt, [QUERIES[1]], [[c]])) for c in group[:2]]
    torch.testing.assert_close(flat(packed), torch.cat(alone), rtol=0, atol=1e-10)


def test_conversations_of_several_turns() -> None:
    turns = (
        {"role": "user", "content": "is she in here?"},
        {"role": "assistant", "content": "she is out there"},
        {"role": "user", "content": "and then?"},
    )
    asked = Query(turns)
    policy = policy_of("qwen3")
    group = completions(4, 2)
    got = scores(policy, TextPrompt(TEXT), [asked], [group])
    context = context_ids(policy, TEXT, asked)
    expected = [own_logprobs(model_of("qwen3"), context, c.token_ids) for c in group]
    torch.testing.assert_close(flat(got), torch.cat(expected), rtol=0, atol=1e-4)


def test_a_bfloat16_soft_prompt_is_its_text_bit_for_bit() -> None:
    """Kept in float32, cast for the forward: the round trip loses nothing."""
    policy = policy_of("llama", torch.bfloat16)
    soft = scores(policy, soft_prompt(policy), QUERIES, GROUPS)
    text = scores(policy, TextPrompt(TEXT), QUERIES, GROUPS)
    assert torch.equal(soft.logprobs, text.logprobs)
