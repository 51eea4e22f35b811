"""Rewards under a limit: learned non-negative multipliers.

maximise E[reward] subject to E[cost_k] <= limit_k is solved by gradient ascent in the policy on
E[reward] - sum_k lambda_k E[cost_k], and by projected gradient ascent in lambda on the violation
(Achiam and Amodei, 2019, PPO-Lagrangian; Altman, 1999). The penalty is part of the reward of a
completion, so that it works with every algorithm.

Letters: B completions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from rlprompt.settings import Settings


class ConstraintSettings(Settings):
    """How the multipliers of rewards with `role: constraint` are learned."""

    lr: float = Field(default=0.1, gt=0.0)
    """How far a multiplier moves per batch and unit of violation."""
    initial: float = Field(default=0.0, ge=0.0)
    """What the multipliers start from."""
    maximum: float | None = Field(default=None, gt=0.0)
    """What they never exceed; null = no bound."""
    rescale: bool = False
    """Divide the penalised reward by 1 + the sum of multipliers, so that its scale stays."""


class Multipliers:
    """One multiplier per constraint, with the rule by which it is learned."""

    def __init__(
        self,
        limits: Mapping[str, float],
        *,
        lr: float,
        initial: float = 0.0,
        maximum: float | None = None,
        rescale: bool = False,
    ) -> None:
        """Keep the rule.

        Args:
            limits: the mean that the values of each constraint are held under, by its name.
            lr: how far a multiplier moves per batch and unit of violation.
            initial: what the multipliers start from.
            maximum: what they never exceed; None = no bound.
            rescale: whether the penalised reward is divided by 1 + sum of multipliers, so that its
                scale stays when multipliers grow (Stooke et al., 2020, arXiv 2007.03964, section
                5).
        """
        self._limits = dict(limits)
        self._lr = lr
        self._maximum = maximum
        self._rescale = rescale
        self._values = dict.fromkeys(self._limits, float(initial))

    @property
    def values(self) -> dict[str, float]:
        """The multipliers."""
        return dict(self._values)

    def penalised(self, rewards: Tensor, costs: Mapping[str, Tensor]) -> Tensor:
        """Rewards [B] minus multiplier * (cost - limit) of each constraint, float32.

        The limit is a constant and changes no baseline's advantage; with it, a reward reads as the
        Lagrangian. A completion without a cost (NaN) is not penalised.

        Args:
            rewards: [B]; NaN = not scored, and stays so.
            costs: the cost [B] of each completion, by the name of the constraint.
        """
        total = rewards.clone()
        for name, multiplier in self._values.items():
            over = (costs[name] - self._limits[name]).nan_to_num(nan=0.0)
            total = total - multiplier * over
        return total / (1.0 + sum(self._values.values())) if self._rescale else total

    def update(self, costs: Mapping[str, Tensor]) -> dict[str, float]:
        """Move every multiplier by its violation; returns metrics under their logged names.

        Args:
            costs: the cost [B] of each completion of the batch, by the name of the constraint; one
                that no completion has leaves its multiplier.
        """
        metrics: dict[str, float] = {}
        for name, limit in self._limits.items():
            known = costs[name][~costs[name].isnan()]
            if known.numel():
                violation = float(known.double().mean()) - limit
                moved = max(0.0, self._values[name] + self._lr * violation)
                self._values[name] = moved if self._maximum is None else min(moved, self._maximum)
                metrics[f"constraint/{name}/violation"] = violation
            metrics[f"constraint/{name}/multiplier"] = self._values[name]
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """What resuming needs."""
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in self._values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: it is of other constraints.
        """
        if set(state) != set(self._values):
            raise ValueError(f"saved for {sorted(state)}, there are {sorted(self._values)}")
        self._values = {name: float(value) for name, value in state.items()}


class Constraints:
    """Multipliers for the constraint rewards of a recipe."""

    def __init__(self, settings: ConstraintSettings, limits: Mapping[str, float]) -> None:
        """Start the multipliers.

        Args:
            settings: the rule by which they are learned.
            limits: the mean cost that each constraint is held under, by its name
                (`RewardRunner.cost_limits`).
        """
        self._multipliers = Multipliers(
            limits,
            lr=settings.lr,
            initial=settings.initial,
            maximum=settings.maximum,
            rescale=settings.rescale,
        )

    def penalised(self, rewards: Tensor, costs: Mapping[str, Tensor]) -> Tensor:
        """Rewards [B] with the multipliers' penalties on costs [B]."""
        return self._multipliers.penalised(rewards, costs)

    def update(self, costs: Mapping[str, Tensor]) -> dict[str, float]:
        """Move the multipliers by the batch's violations; gives `constraint/*` metrics."""
        return self._multipliers.update(costs)

    def state_dict(self) -> dict[str, Tensor]:
        """The multipliers."""
        return self._multipliers.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over multipliers; ValueError when they are of other constraints."""
        self._multipliers.load_state_dict(state)
