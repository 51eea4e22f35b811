"""What an evolution strategy is: a distribution over points that learns from their places.

    strategy.sample(generation)     points
    strategy.update(places)         the places of these points, 0 the best

It knows neither prompts nor rewards, and finds the optimum of any function of a few numbers. The
points of a generation are a function of the state and the generation's number: sampled again they
are the same.

Letters: C candidates, d dimensions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor

from rlprompt.runs.learner import LearnerState


def default_population(dim: int) -> int:
    """The usual size of a generation of CMA-ES, 4 + 3 ln d rounded down.

    Hansen, "The CMA evolution strategy: a tutorial", 2016, arXiv 1604.00772, equation 48.

    Args:
        dim: number of dimensions, d.
    """
    return 4 + math.floor(3 * math.log(dim))


class Strategy(ABC):
    """See the module."""

    @property
    @abstractmethod
    def population(self) -> int:
        """Points of a generation, C."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """float64 [d], a copy: what it believes best."""

    @property
    @abstractmethod
    def deviation(self) -> float:
        """How far it samples: standard deviation of a coordinate, over all of them."""

    @abstractmethod
    def sample(self, generation: int) -> Tensor:
        """The points of a generation, float64 [C, d]."""

    @abstractmethod
    def update(self, places: Tensor) -> None:
        """Learn from the places of the points that were sampled last.

        Args:
            places: [C], 0 the best; see `rlprompt.search.ranking.places`.
        """

    @abstractmethod
    def state(self) -> LearnerState:
        """All that `restore` needs, which later calls do not touch."""

    @abstractmethod
    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken, on a strategy that was made in the same way.

        Raises:
            ValueError: it was made in another way.
        """
