"""A natural evolution strategy over the numbers of a soft or prefix prompt."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rlprompt.runs.learner import LearnerState
from rlprompt.search.base import SearchSettings
from rlprompt.search.continuous import Continuous, ContinuousSettings
from rlprompt.search.natural_gradient import (
    Normal,
    Rates,
    antithetic,
    shape_rate,
    size_rate,
    xnes_update,
)
from rlprompt.search.ranking import utilities
from rlprompt.search.strategy import Strategy, default_population


class ESSettings(ContinuousSettings):
    """Natural evolution strategy with antithetic pairs, ranks and a full covariance."""

    type: Literal["es"] = "es"
    """Searcher."""
    mean_rate: float = Field(default=1.0, gt=0.0, le=2.0)
    """Learning rate of the mean: 1 goes to the weighted mean of the generation's draws."""
    size_rate: float | None = Field(default=None, ge=0.0, le=2.0)
    """Learning rate of the logarithm of the standard deviation; 0 = it stays `sigma`, null = (3 +
    ln d) / (5 sqrt(d)) with d = `dim`."""
    shape_rate: float | None = Field(default=None, ge=0.0, le=2.0)
    """Learning rate of the covariance's shape; 0 = it stays round, null = 3 (3 + ln d) / (5 d
    sqrt(d))."""

    @field_validator("population")
    @classmethod
    def _is_of_pairs(cls, population: int | None) -> int | None:
        if population is not None and population % 2:
            raise ValueError(
                f"{population} candidates are no antithetic pairs; choose {population + 1}"
            )
        return population


class ExponentialNES(Strategy):
    """xNES with antithetic pairs; the mathematics is in `rlprompt.search.natural_gradient`."""

    def __init__(self, settings: ESSettings, seed: int) -> None:
        """Begin at 0.

        Args:
            settings: dimension, rates, and first deviation.
            seed: seed of all draws.
        """
        self._seed = seed
        dim = settings.dim
        self._pairs = math.ceil((settings.population or default_population(dim)) / 2)
        zero, eye = torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)
        self._normal = Normal(zero, settings.sigma, eye)
        size, shape = settings.size_rate, settings.shape_rate
        self._rates = Rates(
            settings.mean_rate,
            size_rate(dim) if size is None else size,
            shape_rate(dim) if shape is None else shape,
        )
        self._sampled = 0

    @property
    def population(self) -> int:
        """Two of each pair."""
        return 2 * self._pairs

    @property
    def mean(self) -> Tensor:
        """The mean of the normal distribution."""
        return self._normal.mean.clone()

    @property
    def deviation(self) -> float:
        """Root mean square of the coordinates' standard deviations."""
        shape = self._normal.shape
        return self._normal.size * float((shape @ shape).diagonal().mean().sqrt())

    def sample(self, generation: int) -> Tensor:
        """See `Strategy.sample`."""
        self._sampled = generation
        return self._normal.points(self._draws)

    @property
    def _draws(self) -> Tensor:
        return antithetic(self._pairs, len(self._normal.mean), self._seed, self._sampled)

    def update(self, places: Tensor) -> None:
        """See `Strategy.update`."""
        self._normal = xnes_update(self._normal, self._draws, utilities(places), self._rates)

    def state(self) -> LearnerState:
        """The normal distribution, and the generation that was sampled last."""
        tensors = {"mean": self._normal.mean.clone(), "shape": self._normal.shape.clone()}
        return LearnerState(tensors, {"size": self._normal.size, "sampled": self._sampled})

    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken; see `Strategy.restore`."""
        if "size" not in state.plain:
            raise ValueError("it was made by another strategy")
        mean, shape = state.tensors["mean"].clone(), state.tensors["shape"].clone()
        if mean.shape != self._normal.mean.shape:
            raise ValueError("it was of another dimension")
        self._normal = Normal(mean, float(state.plain["size"]), shape)
        self._sampled = int(state.plain["sampled"])


class ES(Continuous):
    """Searches with `ExponentialNES`."""

    Settings: ClassVar[type[SearchSettings]] = ESSettings

    @classmethod
    def make_strategy(cls, settings: Any, seed: int) -> Strategy:
        """See `Continuous.make_strategy`."""
        return ExponentialNES(settings, seed)
