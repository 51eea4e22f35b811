"""The mathematics of token search against formulas written out, number by number."""

from __future__ import annotations

import math

import pytest
import torch

from rlprompt.search.substitution import (
    best_tokens,
    one_hot_gradient,
    pooled_advantages,
    surrogate,
    surrogate_slope,
    tapered,
)


def test_a_querys_completions_under_all_candidates_are_one_group() -> None:
    rewards = torch.tensor([[[1.0], [0.5]], [[0.0], [0.5]], [[0.5], [math.nan]]])  # [C, Q, n]
    found = pooled_advantages(rewards)
    scale = math.sqrt((0.5**2 + 0.5**2) / 5)
    wanted = torch.tensor([[[0.5], [0.0]], [[-0.5], [0.0]], [[0.0], [0.0]]]).double() / scale
    assert torch.allclose(found, wanted)
    assert found.dtype == torch.float64


def test_advantages_do_not_depend_on_the_unit_of_the_reward_or_how_hard_a_query_is() -> None:
    rewards = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = 7.0 * rewards + torch.tensor([0.0, 5.0, -3.0, 1.0], dtype=torch.float64)[None, :, None]
    assert torch.allclose(pooled_advantages(rewards), pooled_advantages(moved))


@pytest.mark.parametrize("value", [0.1, math.nan])
def test_rewards_that_do_not_differ_say_nothing(value: float) -> None:
    assert not pooled_advantages(torch.full((3, 2, 2), value)).any()


def test_what_was_bad_under_another_prompt_counts_by_its_ratio_up_to_one() -> None:
    weights = torch.tensor([-1.0, -1.0, -2.0, 1.0, -1.0])
    now = torch.tensor([-1.0, -1.0, -3.0, -3.0, -4.0])
    drawn = torch.tensor([-1.0, -2.0, -1.0, -1.0, math.nan])
    wanted = torch.tensor([-1.0, -1.0, -2.0 * math.exp(-2.0), 1.0, -1.0])
    assert torch.allclose(tapered(weights, now, drawn), wanted)


@pytest.mark.parametrize("clip", [0.2, 0.5])
def test_the_surrogate_imitates_the_good_and_unlearns_the_bad_within_bounds(clip: float) -> None:
    draw = torch.Generator().manual_seed(1)
    reference = -torch.rand(7, generator=draw, dtype=torch.float64)
    logprobs = reference + torch.randn(5, 7, generator=draw, dtype=torch.float64)
    weights = torch.randn(7, generator=draw, dtype=torch.float64)
    found = surrogate(logprobs, reference, weights, clip)
    for row, value in zip(logprobs.tolist(), found.tolist(), strict=True):
        terms = []
        for now, before, weight in zip(row, reference.tolist(), weights.tolist(), strict=True):
            if weight > 0.0:
                terms.append(weight * (now - before))
            else:
                terms.append(weight * max(math.exp(now - before) - 1.0, -clip))
        assert value == pytest.approx(sum(terms) / len(terms), abs=1e-12)
    assert not surrogate(reference, reference, weights, clip).any()


def test_the_slope_is_the_derivative_of_the_surrogate() -> None:
    draw = torch.Generator().manual_seed(2)
    reference = -torch.rand(9, generator=draw, dtype=torch.float64)
    moved = reference + 0.5 * torch.randn(9, generator=draw, dtype=torch.float64)
    weights = torch.randn(9, generator=draw, dtype=torch.float64)
    leaf = moved.clone().requires_grad_()
    surrogate(leaf, reference, weights, 0.1).backward()
    slope = surrogate_slope(moved, reference, weights, 0.1)
    assert leaf.grad is not None and torch.allclose(slope / 9, leaf.grad)
    assert bool((slope == 0.0).any()) and bool((slope != 0.0).any())
    # At the prompt itself it is the policy gradient.
    assert torch.equal(surrogate_slope(reference, reference, weights, 0.1), weights)


def test_the_best_tokens_are_allowed_ones_that_do_not_stand_there() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    allowed = torch.tensor([True, False, True, True, True])
    assert best_tokens(scores, allowed, torch.tensor([0, 1]), 2).tolist() == [[2, 3], [4, 3]]
    # The first place has three others to choose from, the second four: rows are of one length.
    assert best_tokens(scores, allowed, torch.tensor([0, 1]), 99).tolist() == [[2, 3, 4], [4, 3, 2]]


def test_a_one_hot_derivative_is_a_product_with_the_embeddings() -> None:
    table = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.nn.functional.one_hot(torch.tensor([4, 0]), 6).double().requires_grad_()
    embedded = rows @ table
    (embedded**3).sum().backward()
    found = one_hot_gradient(3 * embedded.detach() ** 2, table.detach())
    assert rows.grad is not None and torch.allclose(found, rows.grad)
