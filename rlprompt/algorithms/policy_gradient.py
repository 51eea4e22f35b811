"""What all policy gradients share: clipping, KL in loss or reward, entropy bonus, shaping.

Loss = sum over tokens of w * (surrogate - entropy_coef * entropy) [+ kl_coef * KL estimate]. A
subclass says what advantages are, which ratio the surrogate is about, and what w is.

Letters: B completions, b rows of a micro-batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlprompt.algorithms.base import (
    Algorithm,
    AlgorithmSettings,
    BatchView,
    MicroSignal,
    Need,
    TokenLosses,
)
from rlprompt.algorithms.kl import Estimator, adapted_kl_coef, kl_estimate
from rlprompt.algorithms.losses import (
    Ratio,
    Surrogate,
    clipped_surrogate,
    importance_weights,
    log_ratio,
)
from rlprompt.algorithms.shaping import overlong_penalty
from rlprompt.errors import InputError
from rlprompt.policy import TokenScores
from rlprompt.settings import Settings


class PolicyGradientSettings(AlgorithmSettings):
    """Settings of every policy gradient."""

    group_size: int = Field(default=1, ge=1, le=4096)
    """Completions drawn per query."""
    clip_low: float = Field(default=0.2, gt=0.0, le=1.0)
    """The probability ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0.0)
    """The probability ratio is clipped above 1 + clip_high."""
    kl_coef: float = Field(default=0.0, ge=0.0)
    """Weight of the KL to the reference; 0 computes no reference."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL is counted: as a term of the loss, or taken off the reward."""
    kl_estimator: Estimator = "k3"
    """Estimate of the KL per token: k1 = log ratio, k2 = half its square, k3 = unbiased and never
    negative. In the loss, k2 has the gradient of KL(policy || reference), k3 that of
    KL(reference || policy), and k1 none."""
    kl_bias_correction: bool = False
    """Multiply the KL in the loss by the probability ratio, which is 1 in value in the first update
    but has a gradient: that of k1 and k3 then is the gradient of KL(policy || reference), unbiased
    (DeepSeek-V3.2, arXiv 2512.02556). TRL's `use_bias_correction_kl`, there on by default."""
    kl_target: float | None = Field(default=None, gt=0.0)
    """Wanted `kl` in nats per token, as it is logged: the coefficient adapts to meet it. Null keeps
    `kl_coef` as it is."""
    kl_horizon: int = Field(default=1000, ge=1)
    """Completions over which the coefficient adapts."""
    entropy_coef: float = Field(default=0.0, ge=0.0)
    """Weight of the entropy bonus."""
    overlong_margin: int | None = Field(default=None, ge=1)
    """Take up to 1 off the reward of completions that come within this many tokens of max_tokens,
    growing linearly (DAPO's soft overlong punishment); null = never."""
    mask_truncated: bool = False
    """Give completions that ran into max_tokens no part in the loss."""

    @property
    def needs_reference(self) -> bool:
        """True when the KL has a weight."""
        return self.kl_coef > 0.0

    @property
    def has_later_updates(self) -> bool:
        """Whether a batch gets more than the one update in which all ratios are 1."""
        return self.num_epochs * self.num_minibatches > 1

    _of_the_ratio: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high")

    @property
    def has_ratio(self) -> bool:
        """True."""
        return True

    def check_ratio(self, *, prefetched: bool) -> None:
        """Refuse a changed ratio that is always 1; see `AlgorithmSettings.check_ratio`."""
        if not (prefetched or self.has_later_updates):
            refuse_changed(
                self,
                self._of_the_ratio,
                "with one update per batch, where all ratios are 1; set num_epochs or "
                "num_minibatches, or remove it",
                where="algorithm.",
            )

    @model_validator(mode="after")
    def _policy_gradient_settings_have_effect(self) -> PolicyGradientSettings:
        if self.kl_coef == 0.0:
            names = ("kl_in", "kl_estimator", "kl_bias_correction", "kl_target", "kl_horizon")
            refuse_changed(self, names, "while kl_coef is 0; set kl_coef or remove it")
        elif self.kl_target is None:
            refuse_changed(self, ("kl_horizon",), "without kl_target; set kl_target or remove it")
        if self.kl_in == "reward":
            why = "with kl_in: reward, where the KL has no gradient; remove it"
            refuse_changed(self, ("kl_bias_correction",), why)
        has_gradient = self.kl_estimator != "k1" or self.kl_bias_correction
        if self.kl_coef > 0.0 and self.kl_in == "loss" and not has_gradient:
            raise ValueError(
                "kl_estimator: k1 has no effect in the loss, because its expected gradient is "
                "zero; use k2 or k3, kl_bias_correction: true, or kl_in: reward"
            )
        return self


def refuse_changed(settings: Settings, names: Sequence[str], why: str, where: str = "") -> None:
    """Refuse settings that are not at their default although they have no effect.

    Args:
        settings: the settings to check.
        names: the fields without effect.
        why: the end of the sentence "NAME has no effect ...".
        where: the text before the name.

    Raises:
        ValueError: one is not at its default.
    """
    for name in names:
        if getattr(settings, name) != type(settings).model_fields[name].default:
            raise ValueError(f"{where}{name} has no effect {why}")


class PolicyGradient(Algorithm):
    """The shared part; see the module."""

    settings: PolicyGradientSettings
    ratio: Ratio = "token"
    """What the probability ratio is about."""

    def __init__(self, settings: PolicyGradientSettings, max_tokens: int) -> None:
        """Keep the settings.

        Args:
            settings: the settings of the algorithm.
            max_tokens: the sampling limit.

        Raises:
            InputError: the overlong margin is larger than the limit.
        """
        margin = settings.overlong_margin
        if margin is not None and margin > max_tokens:
            raise InputError(
                f"algorithm.overlong_margin is {margin}, sampling.max_tokens is {max_tokens}; "
                "lower overlong_margin"
            )
        super().__init__(settings, max_tokens)
        self._kl_coef = settings.kl_coef
        self._num_completions = 0

    @property
    def group_size(self) -> int:
        """Completions drawn per query."""
        return self.settings.group_size

    @property
    def needs(self) -> frozenset[Need]:
        """The reference's log-probabilities, and for a KL in the reward also the policy's own."""
        settings = self.settings
        needs: set[Need] = set()
        if settings.needs_reference:
            needs.add("ref_logprobs")
            if settings.kl_in == "reward":
                needs.add("old_logprobs")
        return frozenset(needs)

    @property
    def entropy_grad(self) -> bool:
        """True when the entropy has a weight."""
        return self.settings.entropy_coef > 0.0

    @property
    def kl_coef(self) -> float:
        """The present weight of the KL."""
        return self._kl_coef

    def shaped_rewards(self, view: BatchView) -> Tensor:
        """Rewards [B] with the overlong penalty."""
        self._num_completions = view.rewards.shape[0]
        margin = self.settings.overlong_margin
        if margin is None:
            return view.rewards
        return view.rewards + overlong_penalty(view.lengths, self.max_tokens, margin)

    def kl_penalties(self, view: BatchView) -> Tensor | None:
        """What each token's KL takes off the reward, [B, T]; None when it takes nothing."""
        if self.settings.kl_in != "reward" or not self.settings.needs_reference:
            return None
        assert view.old_logprobs is not None and view.ref_logprobs is not None
        estimate = kl_estimate(view.old_logprobs, view.ref_logprobs, self.settings.kl_estimator)
        return self._kl_coef * estimate * view.mask

    def penalised_rewards(self, view: BatchView) -> Tensor:
        """Shaped rewards [B] minus the KL summed over each completion."""
        rewards, penalties = self.shaped_rewards(view), self.kl_penalties(view)
        return rewards if penalties is None else rewards - penalties.sum(dim=1)

    def counted_lengths(self, view: BatchView) -> Tensor:
        """int64 [B], tokens that take part in the loss."""
        if self.settings.mask_truncated:
            return torch.where(view.terminated, view.lengths, 0)
        return view.lengths

    def surrogate(self, log_ratios: Tensor, logprobs: Tensor, advantages: Tensor) -> Surrogate:
        """The policy-gradient loss of each token."""
        return clipped_surrogate(
            log_ratios, advantages, self.settings.clip_low, self.settings.clip_high
        )

    def losses(self, scores: TokenScores, micro: MicroSignal) -> TokenLosses:
        """Surrogate, KL and entropy bonus; see `Algorithm.losses`."""
        settings, weights = self.settings, micro.weights
        old = micro.old_logprobs if micro.old_logprobs is not None else scores.logprobs.detach()
        ratios = log_ratio(scores.logprobs, old, scores.mask, self.ratio)
        surrogate = self.surrogate(ratios, scores.logprobs, micro.advantages)
        metrics = {"entropy": scores.entropy.detach()}
        of_ratio = self._clip_metrics(surrogate)
        rl = weights * surrogate.loss
        if micro.importance is not None:
            drawn, cap = micro.importance
            factors = importance_weights(old, drawn, scores.mask, self.ratio, cap)
            rl = rl * factors.weights
            of_ratio["sampling/importance_sampling_ratio/mean"] = factors.weights
            of_ratio["sampling/importance_sampling_ratio/truncated"] = factors.cut.float()
        kl = None
        if micro.ref_logprobs is not None:
            distance = kl_estimate(scores.logprobs, micro.ref_logprobs, settings.kl_estimator)
            if settings.kl_bias_correction:
                distance = distance * ratios.exp()
            metrics["kl"] = distance.detach()
            if settings.kl_in == "loss":
                kl = self._kl_coef * (weights * distance).sum()
        ce = None
        if self.entropy_grad:
            ce = -settings.entropy_coef * (weights * scores.entropy).sum()
        per_token = self.ratio == "token"
        return TokenLosses(
            rl=rl.sum(),
            kl=kl,
            ce=ce,
            metrics=metrics | of_ratio if per_token else metrics,
            row_metrics=None if per_token else {k: v[:, 0] for k, v in of_ratio.items()},
        )

    def _clip_metrics(self, surrogate: Surrogate) -> dict[str, Tensor]:
        low, high = surrogate.clipped_low, surrogate.clipped_high
        return {
            "clip_ratio/low_mean": low.float(),
            "clip_ratio/high_mean": high.float(),
            "clip_ratio/region_mean": (low | high).float(),
        }

    def after_batch(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Adapt the KL weight to what the batch had."""
        settings = self.settings
        if settings.kl_target is None:
            return {}
        if "kl" in metrics:
            self._kl_coef = adapted_kl_coef(
                self._kl_coef,
                metrics["kl"],
                settings.kl_target,
                self._num_completions,
                settings.kl_horizon,
            )
        return {"kl_coef": self._kl_coef}

    def state_dict(self) -> dict[str, Tensor]:
        """The KL weight, when it adapts."""
        if self.settings.kl_target is None:
            return {}
        return {"kl_coef": torch.tensor(self._kl_coef, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        if set(state) != set(self.state_dict()):
            raise ValueError(f"state of {sorted(state)}, wanted {sorted(self.state_dict())}")
        if "kl_coef" in state:
            self._kl_coef = float(state["kl_coef"])
