"""Per-token losses of policy and value: pure functions of tensors.

They return a value per token; weighting and summing belong to the caller, so that a batch may be
cut into micro-batches anywhere without changing the loss. A completion is never cut.

Letters: B completions, T tokens. Masks: True = the position counts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Ratio = Literal["token", "sequence_mean", "sequence_product"]
"""What the probability ratio is about: a token (PPO, GRPO), the geometric mean over a completion
(GSPO), or the completion as one action (RLOO, REINFORCE)."""


class Surrogate(NamedTuple):
    """A policy-gradient loss and which of its tokens were clipped."""

    loss: Tensor
    """[B, T], to be minimised."""
    clipped_low: Tensor
    """bool [B, T]: ratio under its bound while the advantage is negative."""
    clipped_high: Tensor
    """bool [B, T]: ratio over its bound while the advantage is positive."""


class ImportanceWeights(NamedTuple):
    """Factors of a policy gradient, and where they were cut."""

    weights: Tensor
    """[B, T], without gradient."""
    cut: Tensor
    """bool [B, T]: the ratio is over the cap."""


class ValueLoss(NamedTuple):
    """A value regression and where it was clipped."""

    loss: Tensor
    """[B, T], to be minimised."""
    clipped: Tensor
    """bool [B, T]: the clipped value is the worse one, so the token has no gradient."""


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, ratio: Ratio) -> Tensor:
    """The logarithm of the probability ratio between the current and the old policy.

    Args:
        logprobs: [B, T] under the policy being trained.
        old_logprobs: [B, T] under the policy before the first update, without gradient.
        mask: bool [B, T], the tokens of the completions.
        ratio: the kind of ratio. `token` gives the ratio of each token. `sequence_mean` gives their
            mean over the completion, the logarithm of GSPO's s_i (Zheng et al., 2025, arXiv
            2507.18071, eq. 7). `sequence_product` gives their sum: the ratio of whole completions.

    Returns:
        [B, T] for `token`, else [B, T] with the completion's one value at each of its tokens.
    """
    gap = logprobs - old_logprobs
    if ratio == "token":
        return gap
    total = (gap * mask).sum(dim=1, keepdim=True)
    if ratio == "sequence_mean":
        total = total / mask.sum(dim=1, keepdim=True).clamp_min(1)
    return total.expand_as(gap)


def importance_weights(
    old_logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor, ratio: Ratio, cap: float
) -> ImportanceWeights:
    """Truncated importance weights for tokens that another program drew.

    min(p_old / p_sampling, cap), of Ionides (2008, "Truncated Importance Sampling"), as Yao et al.
    (2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training") apply them to
    rollout engines that round in another way than training: the surrogate's own ratio starts from
    `old_logprobs`, and this factor leads from what drew the tokens to there.

    Args:
        old_logprobs: [B, T] under the policy before the first update, as training computes it.
        sampling_logprobs: [B, T] as the program gave them that drew the tokens.
        mask: bool [B, T], the tokens of the completions.
        ratio: what the surrogate's ratio is about; the weight is about the same (`log_ratio`).
        cap: the largest weight.
    """
    exact = log_ratio(old_logprobs, sampling_logprobs, mask, ratio).detach().exp()
    return ImportanceWeights(exact.clamp(max=cap), exact > cap)


def clipped_surrogate(
    log_ratios: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Surrogate:
    """The clipped surrogate of PPO (Schulman et al., 2017, arXiv 1707.06347, eq. 7), negated.

    Args:
        log_ratios: [B, T], see `log_ratio`.
        advantages: [B, 1] or [B, T].
        clip_low: the ratio's lower bound is 1 - clip_low.
        clip_high: the ratio's upper bound is 1 + clip_high (equal to clip_low in PPO and GRPO,
            larger in DAPO).
    """
    ratio = torch.exp(log_ratios)
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    low = (ratio < 1.0 - clip_low) & (advantages < 0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0)
    return Surrogate(loss, low, high)


def cispo_surrogate(
    log_ratios: Tensor, logprobs: Tensor, advantages: Tensor, clip_high: float
) -> Surrogate:
    """REINFORCE with a clipped importance weight (MiniMax-M1, 2025, arXiv 2506.13585, eq. 4).

    The weight carries no gradient, so clipping bounds a token's step and never silences it. As in
    that paper's experiments, the weight has no lower bound.

    Args:
        log_ratios: [B, T], see `log_ratio`; used without gradient.
        logprobs: [B, T] under the policy being trained.
        advantages: [B, 1] or [B, T].
        clip_high: the weight's upper bound is 1 + clip_high.
    """
    ratio = torch.exp(log_ratios.detach())
    loss = -ratio.clamp(max=1.0 + clip_high) * advantages * logprobs
    high = (ratio > 1.0 + clip_high) & (advantages > 0)
    return Surrogate(loss, torch.zeros_like(high), high)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> ValueLoss:
    """Half the squared error of the value, or of the value kept near the old one if that is worse.

    PPO's public implementation; not in the paper. CleanRL's `clip_vloss`.

    Args:
        values: [B, T], with gradient.
        old_values: [B, T] before the first update, without.
        returns: [B, T], what is regressed on.
        clip: how far the clipped value may be from the old one, in units of the reward; None
            clips nothing.
    """
    error = (values - returns).square()
    if clip is None:
        return ValueLoss(0.5 * error, torch.zeros_like(error, dtype=torch.bool))
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    bounded_error = (bounded - returns).square()
    return ValueLoss(0.5 * torch.maximum(error, bounded_error), bounded_error > error)
