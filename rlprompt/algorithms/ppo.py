"""Proximal policy optimisation with a value head (Schulman et al., 2017, arXiv 1707.06347).

Advantages per token come from generalised advantage estimation over the completion; the value head
reads the frozen base's final hidden states (`value_head`). Metrics have the names of TRL's
PPOTrainer (until 1.12), which had these parts too: KL in the reward, whitening of rewards and
advantages, a penalty for completions without an end, a clipped value loss.

Letters: B completions, b rows of a micro-batch, T tokens, M = all tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor

from rlprompt.algorithms.advantages import row_weights
from rlprompt.algorithms.base import (
    BatchView,
    MicroSignal,
    Need,
    OwnParameters,
    Signal,
    TokenLosses,
)
from rlprompt.algorithms.gae import explained_variance, gae, token_rewards, whiten
from rlprompt.algorithms.kl import Estimator
from rlprompt.algorithms.losses import clipped_value_loss
from rlprompt.algorithms.policy_gradient import PolicyGradient, PolicyGradientSettings
from rlprompt.algorithms.shaping import missing_eos_penalty
from rlprompt.algorithms.value_head import ValueHead, ValueHeadSettings
from rlprompt.policy import Policy, TokenScores

_HEAD = "value_head."


class PPOSettings(PolicyGradientSettings):
    """Proximal policy optimisation with a value head."""

    type: Literal["ppo"] = "ppo"
    """Algorithm."""
    num_epochs: int = Field(default=4, ge=1)
    """Passes over each batch."""
    kl_in: Literal["loss", "reward"] = "reward"
    """Where the KL is counted: as a term of the loss, or taken off the reward of each token."""
    kl_estimator: Estimator = "k1"
    """Estimate of the KL per token: k1 = log ratio, k2 = half its square, k3 = unbiased and never
    negative. In the loss, k2 has the gradient of KL(policy || reference), k3 that of
    KL(reference || policy), and k1 none."""
    gamma: float = Field(default=1.0, ge=0.0, le=1.0)
    """Discount per token."""
    gae_lambda: float = Field(default=0.95, ge=0.0, le=1.0)
    """Trust in sampled rewards (1) against the value function (0)."""
    whiten_rewards: bool = False
    """Scale the rewards of tokens to unit variance over the batch; their mean stays."""
    whiten_advantages: bool = True
    """Scale the advantages of tokens to mean 0 and unit variance over the batch."""
    missing_eos_penalty: float = Field(default=0.0, ge=0.0)
    """Taken off the reward of completions that ran into max_tokens."""
    value_coef: float = Field(default=0.1, gt=0.0)
    """Weight of the value loss. It trains the value head only, which has its own learning rate: the
    weight acts where gradients are clipped."""
    clip_value: float | None = Field(default=None, gt=0.0)
    """Values far from the old ones by more than this are clipped in the loss, in units of the
    reward; null = never (TRL and CleanRL use 0.2)."""
    value_head: ValueHeadSettings = ValueHeadSettings()
    """The value function."""


class BaseShape(NamedTuple):
    """What the value head must know of the base."""

    hidden_size: int
    device: torch.device
    dtype: torch.dtype
    """Of the hidden states; the head computes in float32 at least."""


class PPO(PolicyGradient):
    """The algorithm; see the module."""

    Settings = PPOSettings
    settings: PPOSettings

    def __init__(
        self, settings: PPOSettings, max_tokens: int, shape: BaseShape, seed: int = 0
    ) -> None:
        """Draw the value head's parameters.

        Args:
            settings: the settings of the algorithm.
            max_tokens: the sampling limit.
            shape: the shape of the base.
            seed: the seed of the value head's parameters.
        """
        super().__init__(settings, max_tokens)
        self._head = ValueHead(
            shape.hidden_size,
            settings.value_head.hidden_size,
            seed=seed,
            device=shape.device,
            dtype=torch.promote_types(shape.dtype, torch.float32),
        )

    @classmethod
    def make(cls, settings: PPOSettings, policy: Policy, max_tokens: int, seed: int) -> Self:
        """With a value head of the base's width; see `Algorithm.make`."""
        base = policy.base
        return cls(settings, max_tokens, BaseShape(base.hidden_size, base.device, base.dtype), seed)

    @property
    def needs(self) -> frozenset[Need]:
        """Values and log-probabilities before the first update, and what the KL needs."""
        return super().needs | {"values", "old_logprobs"}

    def values(self, states: Tensor) -> Tensor:
        """Values [M] of final hidden states [M, d]."""
        values: Tensor = self._head(states)
        return values

    def signal(self, view: BatchView) -> Signal:
        """Advantages [B, T] and returns by GAE; see `Algorithm.signal`."""
        settings = self.settings
        assert view.values is not None
        penalty = missing_eos_penalty(view.terminated, settings.missing_eos_penalty)
        scores = self.shaped_rewards(view) + penalty
        known = ~scores.isnan()
        mask = view.mask & known[:, None]  # [B, T]
        penalties = self.kl_penalties(view)
        rewards = token_rewards(scores.nan_to_num(0.0).to(view.values), mask, penalties)
        if settings.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, view.values, mask, settings.gamma, settings.gae_lambda)
        metrics = _objective(view, scores, penalties, known)
        explained = explained_variance(view.values, returns, mask)
        if not math.isnan(explained):  # returns that do not vary
            metrics["val/explained_variance"] = explained
        counted = torch.where(known, self.counted_lengths(view), 0)
        if settings.whiten_advantages:
            advantages = whiten(advantages, mask & (counted > 0)[:, None])
        return Signal(advantages, counted, metrics, returns)

    def token_weights(self, counted_lengths: Tensor) -> Tensor:
        """The mean over all tokens."""
        return row_weights(counted_lengths, "token", self.max_tokens)

    def losses(self, scores: TokenScores, micro: MicroSignal) -> TokenLosses:
        """Policy and value loss; see `Algorithm.losses`."""
        settings = self.settings
        assert micro.old_logprobs is not None
        assert micro.old_values is not None and micro.returns is not None
        values = scores.unflatten(self.values(scores.states))
        value = clipped_value_loss(values, micro.old_values, micro.returns, settings.clip_value)
        policy = super().losses(scores, micro)
        assert policy.metrics is not None
        gap = scores.logprobs.detach() - micro.old_logprobs
        metrics = {
            **policy.metrics,
            "policy/approxkl_avg": 0.5 * gap.square(),
            "policy/clipfrac_avg": policy.metrics["clip_ratio/region_mean"],
            "policy/entropy_avg": policy.metrics["entropy"],
            "val/ratio": gap.exp(),
            "val/clipfrac_avg": value.clipped.float(),
        }
        loss = settings.value_coef * (micro.weights * value.loss).sum()
        return replace(policy, value=loss, metrics=metrics)

    def after_batch(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """The losses under TRL's names, and what `PolicyGradient` adapts."""
        return {
            "loss/policy_avg": metrics["loss/rl"],
            "loss/value_avg": metrics["loss/value"] / self.settings.value_coef,
            **super().after_batch(metrics),
        }

    def own_parameters(self) -> list[OwnParameters]:
        """The value head's."""
        lr = self.settings.value_head.lr
        return [OwnParameters(tuple(self._head.parameters()), lr)]

    def state_dict(self) -> dict[str, Tensor]:
        """The value head, and the KL weight when it adapts."""
        head = {f"{_HEAD}{k}": v.detach().clone() for k, v in self._head.state_dict().items()}
        return {**head, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        head = {k.removeprefix(_HEAD): v for k, v in state.items() if k.startswith(_HEAD)}
        wanted = {k: v.shape for k, v in self._head.state_dict().items()}
        if {k: v.shape for k, v in head.items()} != wanted:
            raise ValueError("the value head has another shape")
        rest = {k: v for k, v in state.items() if not k.startswith(_HEAD)}
        if set(rest) != set(super().state_dict()):
            raise ValueError(f"unknown or missing state: {sorted(rest)}")
        self._head.load_state_dict(head)
        if "kl_coef" in rest:
            self._kl_coef = float(rest["kl_coef"])


def _objective(
    view: BatchView, scores: Tensor, penalties: Tensor | None, known: Tensor
) -> dict[str, float]:
    """TRL's `objective/*`: means over the completions that were scored."""
    assert view.old_logprobs is not None
    metrics = {"val/num_eos_tokens": float(view.terminated.sum())}
    if not bool(known.any()):
        return metrics
    taken = torch.zeros_like(scores) if penalties is None else penalties.sum(dim=1)
    metrics["objective/scores"] = float(scores[known].mean())
    metrics["objective/non_score_reward"] = -float(taken[known].mean())
    metrics["objective/rlhf_reward"] = float((scores - taken)[known].mean())
    surprise = -(view.old_logprobs * view.mask).sum(dim=1)
    metrics["objective/entropy"] = float(surprise[known].mean())
    if view.ref_logprobs is not None:
        distance = ((view.old_logprobs - view.ref_logprobs) * view.mask).sum(dim=1)
        metrics["objective/kl"] = float(distance[known].mean())
    return metrics
