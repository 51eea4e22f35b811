"""Values of one reward in standard deviations, so that rewards of any scale can be weighed.

`group`: (v - mean) / (std + 1e-4) over the completions of a query, as TRL's `normalize_then_sum`
(GDPO, arXiv 2601.05242). `batch`: the same over the batch. `running`: over all values so far, this
batch included, with Chan, Golub and LeVeque's (1983) update of mean and variance.

A group (or batch) whose values are all equal gives 0. NaN = not scored stays NaN.

Letters: B completions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.rewards.base import RewardSettings

_EPS = 1e-4
"""TRL's guard against a standard deviation of 0."""


class RunningStatistics:
    """Mean and standard deviation of a stream of numbers."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        """Take up numbers of any shape."""
        count = values.numel()
        if count == 0:
            return
        new = values.double()
        mean = float(new.mean())
        squares = float(((new - mean) ** 2).sum())
        delta, total = mean - self.mean, self.count + count
        self.squares += squares + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """With Bessel's correction; 0.0 for fewer than two numbers."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0


class Normaliser:
    """Normalises the rewards whose settings ask for it."""

    def __init__(self, settings: Sequence[RewardSettings]) -> None:
        self._modes = {each.name: each.normalise for each in settings if each.normalise != "none"}
        self._running = {
            name: RunningStatistics() for name, mode in self._modes.items() if mode == "running"
        }

    @property
    def is_needed(self) -> bool:
        """Whether any reward is normalised."""
        return bool(self._modes)

    def normalise(
        self, values: Mapping[str, Tensor], group_index: Sequence[int]
    ) -> dict[str, Tensor]:
        """The normalised values [B] of the rewards that have them; updates running statistics.

        Args:
            values: the values [B] of each reward.
            group_index: the number of each completion's group, B of them.
        """
        groups = torch.tensor(group_index, dtype=torch.int64)
        normal = {}
        for name, mode in self._modes.items():
            raw = values[name]
            if mode == "running":
                stats = self._running[name]
                stats.update(raw[~raw.isnan()])
                normal[name] = (raw - stats.mean) / (stats.std + _EPS)
            else:
                normal[name] = _within(raw, groups if mode == "group" else torch.zeros_like(groups))
        return normal

    def state_dict(self) -> dict[str, list[float]]:
        """Count, mean and sum of squares per reward with running statistics."""
        return {
            name: [float(each.count), each.mean, each.squares]
            for name, each in self._running.items()
        }

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take over a saved state.

        Raises:
            InputError: it is of other rewards.
        """
        if set(state) != set(self._running):
            raise InputError(
                f"the saved running statistics are of the rewards {sorted(state)}, the recipe "
                f"normalises {sorted(self._running)}; restore the recipe, or start a new run"
            )
        for name, (count, mean, squares) in state.items():
            each = self._running[name]
            each.count, each.mean, each.squares = int(count), mean, squares


def _within(values: Tensor, groups: Tensor) -> Tensor:
    normal = torch.full_like(values, torch.nan)
    for group in groups.unique():
        inside = (groups == group) & ~values.isnan()
        known = values[inside]
        std = known.std() if known.numel() > 1 else torch.zeros(())
        normal[inside] = (known - known.mean()) / (std + _EPS)
    return normal
