"""Group relative policy optimisation (Shao et al., 2024, arXiv 2402.03300).

Loss = sum over tokens of w * (clipped surrogate + kl_coef * k3 - entropy_coef * entropy), with
advantages relative to the group of completions of one query. No value function: the group is the
baseline. A group with equal rewards teaches nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rlprompt.algorithms.advantages import (
    Normalizer,
    Scale,
    group_advantages,
    row_weights,
    share_without_spread,
)
from rlprompt.algorithms.base import (
    Algorithm,
    AlgorithmSettings,
    BatchView,
    MicroSignal,
    Need,
    Signal,
    TokenLosses,
)
from rlprompt.algorithms.losses import clipped_surrogate, kl_k3
from rlprompt.policy import TokenScores


class GRPOSettings(AlgorithmSettings):
    """Group relative policy optimisation."""

    type: Literal["grpo"] = "grpo"
    """Algorithm."""
    group_size: int = Field(default=8, ge=2)
    """Completions drawn per query; their mean reward is the baseline."""
    num_epochs: int = Field(default=1, ge=1)
    """Passes over each rollout batch; from the second update on, the clipping acts."""
    num_minibatches: int = Field(default=1, ge=1)
    """Updates per pass, each on its share of the queries."""
    clip_low: float = Field(default=0.2, gt=0.0, le=1.0)
    """The probability ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0.0)
    """The probability ratio is clipped above 1 + clip_high."""
    kl_coef: float = Field(default=0.0, ge=0.0)
    """Weight of the k3 KL to the reference; 0 computes no reference."""
    entropy_coef: float = Field(default=0.0, ge=0.0)
    """Weight of the entropy bonus."""
    scale_rewards: Scale = "group"
    """Divide advantages by the standard deviation of the group, of the batch, or not at all."""
    normalizer: Normalizer = "sequence"
    """Mean over completions of token means (GRPO), mean over tokens (DAPO), or a constant
    (Dr. GRPO)."""
    mask_truncated: bool = False
    """Give completions that ran into max_tokens no part in the loss."""

    @property
    def needs_reference(self) -> bool:
        """True when the KL has a weight."""
        return self.kl_coef > 0.0


class GRPO(Algorithm):
    """The algorithm; see the module."""

    def __init__(self, settings: GRPOSettings, max_tokens: int) -> None:
        """Keep the settings; `max_tokens` is the sampling limit (for the constant normaliser)."""
        self._settings = settings
        self._max_tokens = max_tokens

    @property
    def group_size(self) -> int:
        """Completions drawn per query."""
        return self._settings.group_size

    @property
    def num_epochs(self) -> int:
        """Passes over a batch."""
        return self._settings.num_epochs

    @property
    def num_minibatches(self) -> int:
        """Updates per pass."""
        return self._settings.num_minibatches

    @property
    def needs(self) -> frozenset[Need]:
        """The reference's log-probabilities when the KL has a weight."""
        return frozenset({"ref_logprobs"} if self._settings.needs_reference else ())

    @property
    def entropy_grad(self) -> bool:
        """True when the entropy has a weight."""
        return self._settings.entropy_coef > 0.0

    def signal(self, view: BatchView) -> Signal:
        """Group-relative advantages; see `Algorithm.signal`."""
        settings = self._settings
        advantages = group_advantages(view.rewards, view.group_size, settings.scale_rewards)
        lengths = view.lengths
        counted = torch.where(view.terminated, lengths, 0) if settings.mask_truncated else lengths
        flat = share_without_spread(view.rewards, view.group_size)
        return Signal(advantages, counted, {"frac_reward_zero_std": float(flat)})

    def token_weights(self, counted_lengths: Tensor) -> Tensor:
        """By the normaliser; see `row_weights`."""
        return row_weights(counted_lengths, self._settings.normalizer, self._max_tokens)

    def losses(self, scores: TokenScores, micro: MicroSignal) -> TokenLosses:
        """Clipped surrogate, k3 KL and entropy bonus; see `Algorithm.losses`."""
        settings = self._settings
        weights = micro.weights
        old = micro.old_logprobs if micro.old_logprobs is not None else scores.logprobs.detach()
        surrogate = clipped_surrogate(
            scores.logprobs, old, micro.advantages, settings.clip_low, settings.clip_high
        )
        metrics = {
            "entropy": scores.entropy.detach(),
            "clip_ratio/low_mean": surrogate.clipped_low.float(),
            "clip_ratio/high_mean": surrogate.clipped_high.float(),
            "clip_ratio/region_mean": (surrogate.clipped_low | surrogate.clipped_high).float(),
        }
        kl = None
        if micro.ref_logprobs is not None:
            distance = kl_k3(scores.logprobs, micro.ref_logprobs)
            metrics["kl"] = distance.detach()
            if settings.kl_coef > 0.0:
                kl = settings.kl_coef * (weights * distance).sum()
        ce = None
        if self.entropy_grad:
            ce = -settings.entropy_coef * (weights * scores.entropy).sum()
        return TokenLosses(rl=(weights * surrogate.loss).sum(), kl=kl, ce=ce, metrics=metrics)
