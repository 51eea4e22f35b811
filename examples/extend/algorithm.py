"""An algorithm of your own: MaxRL, which learns most from the queries that rarely succeed.

REINFORCE with the group's mean reward as its baseline, divided by that mean (Tajwar et al., 2026,
arXiv 2602.02710). With rewards of 0 and 1 the expected gradient is then that of the log-likelihood
of success, up to a term that vanishes with the group size.

Letters: N groups, G completions of each, B = N * G, b rows of a micro-batch, T tokens.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

import rlprompt.extend as rl


class MaxRLSettings(rl.AlgorithmSettings):
    """What a recipe may say; the docstring below each field says what it means."""

    group_size: int = Field(default=8, ge=2)
    """Completions drawn per query; their mean reward is the baseline, and what it is divided by."""
    strength: float = Field(default=1.0, ge=0.0, le=1.0)
    """Power of the mean: 0 = REINFORCE with the group's mean as its baseline, 1 = MaxRL."""


class MaxRL(rl.Algorithm):
    """Three things make an algorithm: what completions are worth, weights, and a loss."""

    Settings = MaxRLSettings
    settings: MaxRLSettings

    @property
    def group_size(self) -> int:
        """Completions drawn per query."""
        return self.settings.group_size

    def signal(self, view: rl.BatchView) -> rl.Signal:
        """Advantages [B], from the rewards of a batch; NaN is "could not be scored"."""
        grouped = view.rewards.view(-1, view.group_size)  # [N, G]
        if self.settings.strength and bool((grouped < 0).any()):
            raise rl.InputError(
                "MaxRL divides by the mean reward of a query, and one is negative; give rewards of "
                "at least 0"
            )
        mean = grouped.nanmean(dim=1, keepdim=True)
        advantages = (grouped - mean) / mean.clamp_min(1e-6) ** self.settings.strength
        metrics = {"frac_groups_unsolved": float((mean == 0).float().mean())}
        return rl.Signal(advantages.nan_to_num(0.0).view(-1), view.lengths, metrics)

    def token_weights(self, counted_lengths: Tensor) -> Tensor:
        """What a token of each row counts for, [B]: all alike, so that a completion is a sum."""
        return rl.row_weights(counted_lengths, "constant", self.max_tokens)

    def losses(self, scores: rl.TokenScores, micro: rl.MicroSignal) -> rl.TokenLosses:
        """The loss of a micro-batch; `weights` are those above, 0 in the padding.

        In the first update on a batch the ratio is 1, and its gradient that of the log-probability.
        """
        old = scores.logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
        ratio = (scores.logprobs - old).exp()
        loss = -(micro.weights * micro.advantages * ratio).sum()
        return rl.TokenLosses(rl=loss, metrics={"entropy": scores.entropy.detach()})
