"""Per-token losses: pure functions of tensors, any shape that broadcasts to [B, T].

They return a value per token; weighting and summing belong to the caller, so that a batch may be
cut into micro-batches anywhere without changing the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Surrogate(NamedTuple):
    """A policy-gradient loss and which of its tokens were clipped."""

    loss: Tensor
    """[B, T], to be minimised."""
    clipped_low: Tensor
    """bool [B, T]: ratio under its bound while the advantage is negative."""
    clipped_high: Tensor
    """bool [B, T]: ratio over its bound while the advantage is positive."""


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Surrogate:
    """The clipped surrogate of PPO (Schulman et al., 2017, arXiv 1707.06347, eq. 7), negated.

    Args:
        logprobs: [B, T] under the policy being trained.
        old_logprobs: [B, T] under the policy before the first update, without gradient.
        advantages: [B, 1] or [B, T].
        clip_low: the ratio's lower bound is 1 - clip_low.
        clip_high: the ratio's upper bound is 1 + clip_high (equal to clip_low in PPO and GRPO,
            larger in DAPO).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    low = (ratio < 1.0 - clip_low) & (advantages < 0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0)
    return Surrogate(loss, low, high)


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) per token, >= 0.

    k3 = r - 1 - log r with r = p_ref / p; unbiased under samples of the policy
    (http://joschu.net/blog/kl-approx.html).

    Args:
        logprobs: [B, T], with gradient.
        ref_logprobs: [B, T], without.
    """
    gap = ref_logprobs - logprobs
    return torch.exp(gap) - gap - 1.0
