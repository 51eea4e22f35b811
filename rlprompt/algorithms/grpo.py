"""Group relative policy optimisation (Shao et al., 2024, arXiv 2402.03300) and its family.

Advantages are relative to the group of completions of one query: the group is the baseline, there
is no value function, and a group with equal rewards teaches nothing. Dr. GRPO, DAPO, GSPO and CISPO
are settings (docs/algorithms.md).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from rlprompt.algorithms.advantages import (
    Normalizer,
    Scale,
    group_advantages,
    row_weights,
    share_without_spread,
)
from rlprompt.algorithms.base import BatchView, Signal
from rlprompt.algorithms.losses import Ratio, Surrogate, cispo_surrogate
from rlprompt.algorithms.policy_gradient import (
    PolicyGradient,
    PolicyGradientSettings,
    refuse_changed,
)
from rlprompt.errors import InputError


class GRPOSettings(PolicyGradientSettings):
    """Group relative policy optimisation."""

    type: Literal["grpo"] = "grpo"
    """Algorithm."""
    group_size: int = Field(default=8, ge=2, le=4096)
    """Completions drawn per query; their mean reward is the baseline."""
    ratio: Literal["token", "sequence_mean"] = "token"
    """The probability ratio is that of each token, or its geometric mean over the completion
    (GSPO)."""
    surrogate: Literal["clipped", "cispo"] = "clipped"
    """Clip the objective, so that tokens far out get no gradient, or only the weight of the
    gradient (CISPO)."""
    scale_rewards: Scale = "group"
    """Divide advantages by the standard deviation of the group, of the batch, by the group's mean
    (MaxRL; rewards, penalties included, of 0 and more), or not at all."""
    normalizer: Normalizer = "sequence"
    """Mean over completions of token means (GRPO), mean over tokens (DAPO), or a constant
    (Dr. GRPO)."""
    max_draws: int = Field(default=1, ge=1, le=1000)
    """Draws to fill a batch with groups whose rewards differ (DAPO's dynamic sampling); 1 takes
    what comes."""

    _of_the_ratio: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high", "ratio", "surrogate")

    @model_validator(mode="after")
    def _grpo_settings_have_effect(self) -> GRPOSettings:
        if self.surrogate == "cispo":
            refuse_changed(self, ("clip_low",), "with surrogate: cispo; remove it")
        if self.ratio == "sequence_mean" and self.normalizer != "sequence":
            raise ValueError(
                f"normalizer: {self.normalizer} weighs tokens, ratio: sequence_mean is about whole "
                "completions; use normalizer: sequence"
            )
        return self


class GRPO(PolicyGradient):
    """The algorithm; see the module."""

    Settings = GRPOSettings
    settings: GRPOSettings

    def __init__(self, settings: GRPOSettings, max_tokens: int) -> None:
        """Keep the settings; see `PolicyGradient`."""
        super().__init__(settings, max_tokens)
        self.ratio: Ratio = settings.ratio

    @property
    def max_draws(self) -> int:
        """Draws to fill a batch."""
        return self.settings.max_draws

    def signal(self, view: BatchView) -> Signal:
        """Group-relative advantages; see `Algorithm.signal`."""
        rewards = self.penalised_rewards(view)
        try:
            advantages = group_advantages(rewards, view.group_size, self.settings.scale_rewards)
        except ValueError as error:
            if self.settings.scale_rewards != "mean":
                raise
            raise InputError(
                f"algorithm.scale_rewards is mean, but {error}: shift the rewards, take penalties "
                "out of them, or use scale_rewards: group"
            ) from error
        flat = share_without_spread(view.rewards, view.group_size)
        metrics = {"frac_reward_zero_std": float(flat)}
        return Signal(advantages, self.counted_lengths(view), metrics)

    def token_weights(self, counted_lengths: Tensor) -> Tensor:
        """By the normaliser; see `row_weights`."""
        return row_weights(counted_lengths, self.settings.normalizer, self.max_tokens)

    def surrogate(self, log_ratios: Tensor, logprobs: Tensor, advantages: Tensor) -> Surrogate:
        """PPO's surrogate, or CISPO's."""
        if self.settings.surrogate == "cispo":
            high = self.settings.clip_high
            return cispo_surrogate(log_ratios, logprobs, advantages, high)
        return super().surrogate(log_ratios, logprobs, advantages)
