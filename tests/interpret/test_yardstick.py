"""KL to the inspected prompt: 0 for the same behaviour, and the same as computed the long way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlprompt.interpret.derived import CutPrompt, without_positions
from rlprompt.interpret.yardstick import Yardstick, share_of
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from tests.fixtures.prompts import TEXT, make
from tests.interpret.subjects import answers, tiny_policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


def slow_kl(policy: Policy, prompt: Prompt, other: Prompt, place: int) -> float:
    """By the model's own head on whole sequences, one query at a time."""
    group = answers(policy, prompt)[place]
    total, count = 0.0, 0
    rows = []
    for each in (prompt, other):
        prefix = policy.prefix(each)
        states = policy.hidden_scored([group.query], [group.completions], prefix, each)
        head = policy.base.model.get_output_embeddings()
        assert head is not None
        rows.append(head(states).log_softmax(1).double())
    total = float((rows[0].exp() * (rows[0] - rows[1])).sum())
    count = sum(len(c.token_ids) for c in group.completions)
    return total / count


def test_the_text_that_a_soft_prompt_is_has_no_distance(policy: Policy) -> None:
    prompt = make("soft", policy)
    found = Yardstick(policy, prompt, answers(policy, prompt)).kl(TextPrompt(TEXT))
    assert np.abs(found).max() < 1e-5


def test_the_distance_is_the_one_computed_the_long_way(policy: Policy) -> None:
    prompt = make("soft", policy, noise=1.0)
    found = Yardstick(policy, prompt, answers(policy, prompt)).kl(NonePrompt())
    with torch.no_grad():
        slow = [slow_kl(policy, prompt, NonePrompt(), place) for place in range(len(found))]
    assert found == pytest.approx(slow, abs=1e-5) and found.min() > 0.001


@pytest.mark.parametrize("kind", ["soft", "prefix", "lora"])
def test_a_prefix_of_which_all_is_kept_has_no_distance(policy: Policy, kind: str) -> None:
    prompt = make(kind, policy, noise=1.0)
    yardstick = Yardstick(policy, prompt, answers(policy, prompt))
    head = len(policy.head_ids)
    every = range(yardstick.prefix.num_tokens - head)
    whole = yardstick.kl_of_prefix(without_positions(yardstick.prefix, head, every))
    assert np.abs(whole).max() < 1e-6
    less = yardstick.kl_of_prefix(without_positions(yardstick.prefix, head, every[1:]))
    assert less.max() > 1e-4


def test_the_last_position_masked_leaves_the_positions_behind_it_where_they_were(
    policy: Policy,
) -> None:
    """Masking the last vector is what a prompt without it gives, with all later tokens one on."""
    prompt = make("soft", policy, noise=1.0)
    groups = answers(policy, prompt)
    yardstick = Yardstick(policy, prompt, groups)
    vectors = prompt.parameters()[0].detach()
    head = len(policy.head_ids)
    kept = list(range(len(vectors) - 1))
    masked = yardstick.kl_of_prefix(without_positions(yardstick.prefix, head, kept))
    moved_up = yardstick.kl(CutPrompt(vectors[:-1]))
    assert masked.min() > 0 and moved_up.min() > 0
    assert masked != pytest.approx(moved_up)  # rotary positions differ by one


def test_a_share_has_an_interval_and_needs_something_to_share() -> None:
    whole = np.asarray([1.0, 2.0, 3.0, 2.0])
    found = share_of(0.5 * whole, whole)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    rough = share_of(np.asarray([1.0, 0.0, 3.0, 0.0]), whole)
    assert rough is not None and rough.value == pytest.approx(0.5)
    assert rough.low < 0.5 < rough.high
    assert share_of(whole, np.asarray([1.0, -1.0, 0.5, -0.6])) is None
    assert share_of(whole[:2], whole[:2]) is None
    unknown = share_of(np.asarray([np.nan, 1.0, 1.5, 1.0]), whole)
    assert unknown is not None and unknown.value == pytest.approx(0.5)
