"""Advantages of tokens: rewards per token, generalised advantage estimation, whitening.

A completion is an episode, a token an action. `values[:, t]` is the value of the state in which
token t is chosen; the state after the last token is terminal and has value 0, whether a stop token
or the token limit ended the completion.

Letters: B completions, T tokens. Masks: True = the position counts; a row's tokens come first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenReturns(NamedTuple):
    """What `gae` makes of rewards and values."""

    advantages: Tensor
    """[B, T], 0 in the padding."""
    returns: Tensor
    """[B, T], advantages + values: what the value regresses on; 0 in the padding."""


def token_rewards(scores: Tensor, mask: Tensor, penalties: Tensor | None = None) -> Tensor:
    """Rewards per token [B, T]: the score at the last token, minus penalties everywhere.

    Args:
        scores: [B], one per completion.
        mask: bool [B, T].
        penalties: [B, T], for instance kl_coef times the KL of each token.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = positions == mask.sum(dim=1, keepdim=True) - 1  # [B, T]
    rewards = torch.where(last, scores[:, None], torch.zeros_like(scores)[:, None])
    if penalties is not None:
        rewards = rewards - penalties * mask
    return rewards


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> TokenReturns:
    """Generalised advantage estimation (Schulman et al., 2016, arXiv 1506.02438, eqs. 11, 16).

    delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lambda * A_{t+1}.

    Args:
        rewards: [B, T] per token.
        values: [B, T], without gradient.
        mask: bool [B, T].
        gamma: the discount per token, in [0, 1].
        gae_lambda: the trust in sampled rewards, in [0, 1]: 0 trusts the value function alone.
    """
    values = values * mask
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])  # A_{t+1}
    next_value = torch.zeros_like(values[:, 0])  # V_{t+1}
    for step in reversed(range(values.shape[1])):
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        following = (delta + gamma * gae_lambda * following) * mask[:, step]
        next_value = values[:, step]
        advantages[:, step] = following
    return TokenReturns(advantages, advantages + values)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Values with unit variance over the masked positions, 0 elsewhere.

    Args:
        values: [B, T].
        mask: bool [B, T].
        shift_mean: whether the mean is taken off too (advantages); rewards keep theirs, so that
            their sign and what is best do not depend on the batch.
    """
    count = mask.sum()
    mean = (values * mask).sum() / count.clamp_min(1)
    variance = ((values - mean).square() * mask).sum() / (count - 1).clamp_min(1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over masked positions.

    1 for a perfect value function, 0 for one no better than a constant, negative for a worse one;
    NaN when the returns do not vary.
    """
    chosen = returns[mask].double()
    spread = chosen.var(correction=0) if chosen.numel() else chosen.sum()
    if float(spread) == 0.0:
        return float("nan")
    error = (chosen - values[mask].double()).var(correction=0)
    return float(1.0 - error / spread)
