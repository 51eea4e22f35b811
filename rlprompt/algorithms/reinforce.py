"""REINFORCE, and RLOO: a whole completion is one action, its baseline a mean of rewards.

The gradient of a completion is its advantage times the gradient of its log-probability, the sum
over its tokens (Williams, 1992; Ahmadian et al., 2024, arXiv 2402.14740). With several updates per
batch, the ratio of whole completions is clipped as in PPO, which is what TRL's RLOO does too.

REINFORCE takes the mean reward of the batch as its baseline, RLOO (Kool et al., 2019) the mean of
the other completions of the same query.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from rlprompt.algorithms.advantages import (
    batch_advantages,
    leave_one_out_advantages,
    row_weights,
    share_without_spread,
)
from rlprompt.algorithms.base import BatchView, Signal
from rlprompt.algorithms.kl import Estimator
from rlprompt.algorithms.losses import Ratio
from rlprompt.algorithms.policy_gradient import PolicyGradient, PolicyGradientSettings
from rlprompt.errors import InputError


class CompletionActionSettings(PolicyGradientSettings):
    """What REINFORCE and RLOO share: the KL is part of the reward."""

    kl_in: Literal["loss", "reward"] = "reward"
    """Where the KL is counted: as a term of the loss, or taken off the reward."""
    kl_estimator: Estimator = "k1"
    """Estimate of the KL per token: k1 = log ratio, k2 = half its square, k3 = unbiased and never
    negative. In the loss, k2 has the gradient of KL(policy || reference), k3 that of
    KL(reference || policy), and k1 none."""
    normalize_advantages: bool = False
    """Divide advantages by their standard deviation over the batch."""


class RLOOSettings(CompletionActionSettings):
    """REINFORCE with a leave-one-out baseline."""

    type: Literal["rloo"] = "rloo"
    """Algorithm."""
    group_size: int = Field(default=8, ge=2, le=4096)
    """Completions drawn per query; the mean reward of the others is the baseline of each."""
    max_draws: int = Field(default=1, ge=1, le=1000)
    """Draws to fill a batch with groups whose rewards differ; 1 takes what comes."""


class ReinforceSettings(CompletionActionSettings):
    """REINFORCE with the batch's mean reward as its baseline."""

    type: Literal["reinforce"] = "reinforce"
    """Algorithm."""


class _CompletionAction(PolicyGradient):
    """A completion is one action."""

    settings: CompletionActionSettings
    ratio: Ratio = "sequence_product"

    def token_weights(self, counted_lengths: Tensor) -> Tensor:
        """The mean over completions: the loss of a completion stands at each of its tokens."""
        return row_weights(counted_lengths, "sequence", self.max_tokens)


class RLOO(_CompletionAction):
    """The algorithm; see the module."""

    Settings = RLOOSettings
    settings: RLOOSettings

    @property
    def max_draws(self) -> int:
        """Draws to fill a batch."""
        return self.settings.max_draws

    def signal(self, view: BatchView) -> Signal:
        """Leave-one-out advantages; see `Algorithm.signal`."""
        rewards = self.penalised_rewards(view)
        normalize = self.settings.normalize_advantages
        advantages = leave_one_out_advantages(rewards, view.group_size, normalize)
        flat = share_without_spread(view.rewards, view.group_size)
        metrics = {"frac_reward_zero_std": float(flat)}
        return Signal(advantages, self.counted_lengths(view), metrics)


class Reinforce(_CompletionAction):
    """The algorithm; see the module."""

    Settings = ReinforceSettings

    def signal(self, view: BatchView) -> Signal:
        """Advantages over the batch's mean; see `Algorithm.signal`.

        Raises:
            InputError: one completion, whose reward would be its own baseline.
        """
        if view.rewards.shape[0] < 2:
            raise InputError(
                "reinforce needs at least two completions per step to have a baseline; raise "
                "training.queries_per_step or algorithm.group_size"
            )
        normalize = self.settings.normalize_advantages
        advantages = batch_advantages(self.penalised_rewards(view), normalize)
        return Signal(advantages, self.counted_lengths(view))
