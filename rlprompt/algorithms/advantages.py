"""Advantages of scored completions: pure functions of tensors.

Letters: B completions, G group size. A reward of NaN means that no reward could score the
completion.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "mean", "none"]
Normalizer = Literal["sequence", "token", "constant"]

STD_FLOOR = 1e-4
"""Added to standard deviations, as TRL does."""


def group_advantages(rewards: Tensor, group_size: int, scale: Scale) -> Tensor:
    """Rewards relative to their group's mean (Shao et al., 2024, arXiv 2402.03300, section 4.1.2).

    Computed in float64: the mean of equal float32 rewards is then exactly their value, where a
    float32 mean of large ones is off by about `STD_FLOOR` and would teach its rounding error.

    Args:
        rewards: [B] float32, completions of a group beside each other; NaN = not scored.
        group_size: the completions of a group, G; B is a multiple of it.
        scale: the divisor: the group's standard deviation (GRPO), the batch's, the group's mean
            (MaxRL, arXiv 2602.02710: a query that rarely succeeds weighs more, and no advantage is
            above G - 1), or none (Dr. GRPO, arXiv 2503.20783). Standard deviations are the unbiased
            ones.

    Returns:
        float32 [B]; 0 where the reward is NaN, and everywhere in a group with equal rewards.

    Raises:
        ValueError: B is not a multiple of G, or a group's mean is to divide rewards of which one is
            negative: its sign would turn the advantages round.
    """
    if rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not fill groups of {group_size}")
    grouped = rewards.double().view(-1, group_size)
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (_nanstd(grouped) + STD_FLOOR)
    elif scale == "batch":
        centred = centred / (_nanstd(rewards.double()[None]) + STD_FLOOR)
    elif scale == "mean":
        if (rewards < 0).any():
            lowest = float(rewards.nan_to_num(nan=0.0).min())
            raise ValueError(f"a reward is {lowest:.3g}; a mean divides rewards of 0 and more only")
        centred = centred / grouped.nanmean(dim=1, keepdim=True)  # 0 / 0 where all are 0
    return centred.nan_to_num(nan=0.0).view(-1).float()


def leave_one_out_advantages(rewards: Tensor, group_size: int, normalize: bool = False) -> Tensor:
    """Rewards relative to the mean of the *other* completions of the group (RLOO).

    Kool et al., 2019; Ahmadian et al., 2024 (arXiv 2402.14740, eq. 8). The baseline does not depend
    on the completion itself, so the gradient is unbiased; without missing rewards it is the
    group-relative advantage times G / (G - 1).

    Args:
        rewards: [B] float32, completions of a group beside each other; NaN = not scored.
        group_size: the completions of a group, G >= 2; B is a multiple of it.
        normalize: whether the batch's mean is then taken off, and the rest divided by the batch's
            standard deviation.

    Returns:
        float32 [B]; 0 where the reward is NaN or no other completion of the group has one.

    Raises:
        ValueError: B is not a multiple of G.
    """
    if rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not fill groups of {group_size}")
    grouped = rewards.double().view(-1, group_size)
    known = (~grouped.isnan()).sum(dim=1, keepdim=True)
    # n / (n - 1) * (r - mean) is r - mean of the others, and exactly 0 where rewards are equal.
    factor = torch.where(known > 1, known / (known - 1).clamp_min(1), torch.nan)
    advantages = (factor * (grouped - grouped.nanmean(dim=1, keepdim=True))).view(1, -1)
    if normalize:
        mean = advantages.nanmean(dim=1, keepdim=True)
        advantages = (advantages - mean) / (_nanstd(advantages) + STD_FLOOR)
    return advantages.nan_to_num(nan=0.0).view(-1).float()


def batch_advantages(rewards: Tensor, normalize: bool) -> Tensor:
    """Rewards relative to the mean of the batch: REINFORCE with a constant baseline.

    Williams, 1992. The mean holds the completion's own reward, which scales the expected gradient
    by (B - 1) / B and otherwise leaves it alone.

    Args:
        rewards: [B] float32; NaN = not scored.
        normalize: whether the result is divided by the batch's standard deviation.

    Returns:
        float32 [B]; 0 where the reward is NaN, and everywhere when all are equal.
    """
    return group_advantages(rewards, max(1, rewards.numel()), "group" if normalize else "none")


def groups_with_spread(rewards: Tensor, group_size: int) -> Tensor:
    """Which groups hold two different rewards and so teach something, bool [B / G].

    DAPO's dynamic sampling draws again in place of the others (arXiv 2503.14476, section 3.2).
    """
    return (_nanstd(rewards.double().view(-1, group_size)) >= 1e-8).squeeze(1)


def _nanstd(values: Tensor) -> Tensor:
    """Unbiased standard deviation of each row without its NaNs, [R, 1]; 0 for fewer than two."""
    known = ~values.isnan()
    count = known.sum(dim=1, keepdim=True)
    deviation = (values - values.nanmean(dim=1, keepdim=True)).nan_to_num(nan=0.0)
    variance = deviation.square().sum(dim=1, keepdim=True) / (count - 1).clamp_min(1)
    return variance.sqrt()


def share_without_spread(rewards: Tensor, group_size: int) -> Tensor:
    """The share of groups without two different rewards: they teach nothing. A scalar in [0, 1]."""
    return (~groups_with_spread(rewards, group_size)).float().mean()


def row_weights(lengths: Tensor, normalizer: Normalizer, max_tokens: int) -> Tensor:
    """What one token of each completion counts for in the loss, [B].

    Summed over all tokens of all micro-batches, weighted token losses give the batch loss, however
    the batch was cut: the normaliser is global.

    Args:
        lengths: int64 [B], tokens that count in each completion; rows of length 0 count nothing.
        normalizer: the normaliser: `sequence`, the mean over completions of their token means
            (GRPO); `token`, the mean over all tokens (DAPO, arXiv 2503.14476); `constant`, the sum
            over all tokens divided by B * max_tokens (Dr. GRPO).
        max_tokens: the longest completion allowed.
    """
    count = lengths.shape[0]
    active = (lengths > 0).float()
    if normalizer == "sequence":
        return active / (count * lengths.clamp_min(1))
    if normalizer == "token":
        return active / lengths.sum().clamp_min(1)
    return active / (count * max_tokens)
