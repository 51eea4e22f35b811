"""Advantages of tokens against a plain loop over one completion, written from the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlprompt.algorithms.gae import explained_variance, gae, token_rewards, whiten

LENGTHS = [6, 1, 4, 0]
MASK = torch.arange(6)[None] < torch.tensor(LENGTHS)[:, None]


def noise(seed: int) -> Tensor:
    """fp64 [4, 6], the padding included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, generator=generator, dtype=torch.float64)


def plain_gae(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """Eq. 16 of arXiv 1506.02438 term by term: the sum over l of (gamma lambda)^l delta_{t+l}."""
    ends = [*values, 0.0]
    deltas = [r + gamma * ends[t + 1] - ends[t] for t, r in enumerate(rewards)]
    advantages = [
        sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas[t:]))
        for t in range(len(rewards))
    ]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0), (0.0, 0.7)]
)
def test_gae_is_the_sum_that_defines_it(gamma: float, lam: float) -> None:
    rewards, values = noise(0) * MASK, noise(1)  # the values of padding are noise, and not used
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for row, length in enumerate(LENGTHS):
        theirs = plain_gae(
            rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam
        )
        assert advantages[row, :length].tolist() == pytest.approx(theirs[0], abs=1e-12)
        assert returns[row, :length].tolist() == pytest.approx(theirs[1], abs=1e-12)
    assert not advantages[~MASK].any() and not returns[~MASK].any()


def test_with_lambda_one_returns_are_the_discounted_rewards_whatever_the_values() -> None:
    rewards = noise(0) * MASK
    returns = gae(rewards, noise(1), MASK, 0.9, 1.0).returns
    other = gae(rewards, 10 * noise(2), MASK, 0.9, 1.0).returns
    torch.testing.assert_close(returns, other, rtol=0, atol=1e-12)
    assert returns[2, 2].item() == pytest.approx(float(rewards[2, 2] + 0.9 * rewards[2, 3]))


def test_the_score_lies_on_the_last_token_and_penalties_on_all() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rewards = token_rewards(scores, MASK, 0.5 * torch.ones(4, 6))
    assert rewards[0].tolist() == [-0.5] * 5 + [0.5]
    assert rewards[1].tolist() == [1.5] + [0.0] * 5
    assert rewards[2].tolist() == [-0.5, -0.5, -0.5, 2.5, 0.0, 0.0]
    assert rewards[3].tolist() == [0.0] * 6
    torch.testing.assert_close(token_rewards(scores, MASK).sum(1), torch.tensor([1.0, 2, 3, 0]))


def test_whitening_gives_unit_variance_and_may_keep_the_mean() -> None:
    values = 3 * noise(0) + 7
    whitened = whiten(values, MASK)
    assert float(whitened[MASK].mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(whitened[MASK].std()) == pytest.approx(1.0, abs=1e-8)
    assert not whitened[~MASK].any()
    kept = whiten(values, MASK, shift_mean=False)
    assert float(kept[MASK].mean()) == pytest.approx(float(values[MASK].mean()))
    assert float(kept[MASK].std()) == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("count", [0, 1, 6])
def test_whitening_what_does_not_vary_stays_finite(count: int) -> None:
    mask = torch.arange(6)[None] < count
    assert whiten(torch.full((1, 6), 3.0), mask).tolist() == [[0.0] * 6]


def test_explained_variance_of_good_useless_and_bad_values() -> None:
    returns = noise(0)
    assert explained_variance(returns, returns, MASK) == 1.0
    assert explained_variance(torch.full_like(returns, 5.0), returns, MASK) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, MASK) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(returns, torch.ones_like(returns), MASK))
    assert math.isnan(explained_variance(returns, returns, torch.zeros_like(MASK)))
