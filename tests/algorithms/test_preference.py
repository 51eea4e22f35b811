"""Preference losses by their properties; parity with TRL is in tests/parity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlprompt.algorithms.preference import PairLogprobs, dpo_loss, implicit_rewards, ipo_loss


def pairs(margin: float = 0.0, requires_grad: bool = False) -> PairLogprobs:
    """Two pairs whose policy margin over the reference is `margin`."""
    ref_chosen, ref_rejected = torch.tensor([-5.0, -9.0]), torch.tensor([-7.0, -8.0])
    chosen = (ref_chosen + margin).requires_grad_(requires_grad)
    return PairLogprobs(
        chosen, ref_rejected.clone().requires_grad_(requires_grad), ref_chosen, ref_rejected
    )


def test_at_the_reference_the_loss_is_log_two_and_pulls_both_ways_alike() -> None:
    start = pairs(requires_grad=True)
    loss = dpo_loss(start, 0.1)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)
    loss.sum().backward()
    for given, sign in ((start.chosen, -1.0), (start.rejected, 1.0)):
        assert given.grad is not None
        assert given.grad.tolist() == pytest.approx([sign * 0.05] * 2)


def test_smoothing_moves_the_optimum_from_infinity_to_a_margin() -> None:
    coef, smoothing = 0.5, 0.1
    best = math.log((1 - smoothing) / smoothing) / coef
    at = {m: float(dpo_loss(pairs(m), coef, smoothing)[0]) for m in (best - 1, best, best + 1)}
    assert at[best] < min(at[best - 1], at[best + 1])
    assert float(dpo_loss(pairs(best + 1), coef)[0]) < float(dpo_loss(pairs(best), coef)[0])


def test_ipo_is_zero_where_the_mean_margin_is_half_the_inverse_coefficient() -> None:
    lengths = torch.tensor([4, 8])
    margin = 4 / (2 * 0.25)  # over 4 tokens: 1 / (2 * 0.25) per token
    loss: Tensor = ipo_loss(pairs(margin), lengths, lengths, 0.25)
    assert loss.tolist() == pytest.approx([0.0, (8 / 8 - 2.0) ** 2])


def test_implicit_rewards_are_relative_to_the_reference() -> None:
    chosen, rejected = implicit_rewards(pairs(3.0), 0.1)
    assert chosen.tolist() == pytest.approx([0.3, 0.3], abs=1e-6)
    assert rejected.tolist() == [0.0, 0.0]
