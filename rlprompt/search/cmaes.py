"""CMA-ES over the numbers of a soft or prefix prompt, by the `cma` package of its author.

Hansen, "The CMA evolution strategy: a tutorial", 2016 (arXiv 1604.00772).

The package's object is full of what a checkpoint should not hold (files, clocks, functions), and is
made to be pickled, which a checkpoint must not be. So what is kept here are the numbers of the
distribution and its paths, and in each generation an object is made that has them. A resumed search
is then the uninterrupted one because both do the same; that it is what the package does when its
object lives on is a test.

Letters: C candidates, d dimensions.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.runs.learner import LearnerState
from rlprompt.search.base import SearchSettings
from rlprompt.search.continuous import Continuous, ContinuousSettings
from rlprompt.search.strategy import Strategy, default_population

_ARRAYS = {
    "mean": ("", "mean"),
    "pc": ("", "pc"),
    "pc2": ("", "pc2"),
    "ps": ("adapt_sigma", "ps"),
    "covariance": ("sm", "C"),
    "axes": ("sm", "B"),
    "lengths": ("sm", "D"),
}
"""Tensors of the state: the part of the package's object, its attribute."""
_NUMBERS = {
    "sigma": ("", "sigma"),
    "iterations": ("", "countiter"),
    "evaluations": ("", "countevals"),
    "step_ratio": ("adapt_sigma", "delta"),
    "path_iteration": ("adapt_sigma", "_ps_updated_iteration"),
    "updates": ("sm", "count_tell"),
    "last_decomposition": ("sm", "last_update"),
    "decompositions": ("sm", "count_eigen"),
}
"""Plain values of the state."""


class CMAESSettings(ContinuousSettings):
    """Evolution strategy that learns the covariance of good changes, by the `cma` package."""

    type: Literal["cmaes"] = "cmaes"
    """Searcher."""


class CovarianceMatrixAdaptation(Strategy):
    """The package's strategy between two generations: its numbers."""

    def __init__(self, dim: int, sigma: float, population: int | None, seed: int) -> None:
        """Begin at 0.

        Args:
            dim: number of coordinates.
            sigma: first standard deviation of each.
            population: points of a generation, 4 at least; None = 4 + 3 ln(dim).
            seed: seed of all draws.

        Raises:
            InputError: the package is missing.
        """
        self._cma = _package()
        self._dim, self._sigma, self._seed = dim, sigma, seed
        self._population = population or default_population(dim)
        self._arrays: dict[str, NDArray[np.float64]] = {}
        self._numbers: dict[str, Any] = {}
        self._generator = np.random.default_rng()
        self._template = self._made()
        self._keep(self._template)
        self._sampled = 0
        """The generation that was sampled last."""

    @property
    def population(self) -> int:
        """As it was chosen."""
        return self._population

    @property
    def mean(self) -> Tensor:
        """The mean of the normal distribution."""
        return torch.from_numpy(self._arrays["mean"].copy())

    @property
    def deviation(self) -> float:
        """Root mean square of the coordinates' standard deviations."""
        variance = float(np.trace(self._arrays["covariance"])) / self._dim
        return float(self._numbers["sigma"]) * math.sqrt(variance)

    def sample(self, generation: int) -> Tensor:
        """See `Strategy.sample`."""
        self._sampled = generation
        return torch.from_numpy(np.stack(self._at(generation).ask()))

    def update(self, places: Tensor) -> None:
        """See `Strategy.update`."""
        strategy = self._at(self._sampled)
        strategy.tell(strategy.ask(), places.tolist())
        self._keep(strategy)

    def _made(self) -> Any:
        """A `cma.CMAEvolutionStrategy` that draws from the generator of now."""
        options = {
            "popsize": self._population,
            "randn": lambda *shape: self._generator.standard_normal(shape),
            "seed": math.nan,  # leave NumPy's own generator alone
            "verbose": -9,
            "verb_log": 0,
            "verb_disp": 0,
            "conditioncov_alleviate": None,  # it would change what the coordinates are
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._cma.CMAEvolutionStrategy([0.0] * self._dim, self._sigma, options)

    def _at(self, generation: int) -> Any:
        """The package's object with the numbers of now, and the draws of a generation ahead."""
        self._generator = np.random.default_rng([self._seed, generation])
        strategy = copy.deepcopy(self._template)
        # These it has from its first generation on; neither changes what it does.
        strategy.timer = self._cma.utilities.utils.ElapsedWCTime()
        strategy.mean_old = self._arrays["mean"].copy()
        for name, (part, attribute) in _ARRAYS.items():
            setattr(_part(strategy, part), attribute, self._arrays[name].copy())
        for name, (part, attribute) in _NUMBERS.items():
            setattr(_part(strategy, part), attribute, self._numbers[name])
        return strategy

    def _keep(self, strategy: Any) -> None:
        """Take the numbers out of the package's object."""
        for name, (part, attribute) in _ARRAYS.items():
            value = np.array(getattr(_part(strategy, part), attribute), dtype=np.float64)
            self._arrays[name] = value
        for name, (part, attribute) in _NUMBERS.items():
            value = getattr(_part(strategy, part), attribute)
            self._numbers[name] = float(value) if isinstance(value, float) else int(value)

    def state(self) -> LearnerState:
        """The numbers of the distribution and its paths, and the version of the package."""
        tensors = {name: torch.from_numpy(value.copy()) for name, value in self._arrays.items()}
        plain = {**self._numbers, "sampled": self._sampled, "cma": self._cma.__version__}
        return LearnerState(tensors, plain)

    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken; see `Strategy.restore`."""
        plain = state.plain
        if "cma" not in plain:
            raise ValueError("it was made by another strategy")
        version = self._cma.__version__
        if plain["cma"] != version:
            raise ValueError(
                f"it was made with cma {plain['cma']} and this is {version}, which may differ; "
                f"install cma=={plain['cma']}"
            )
        if state.tensors["covariance"].shape != (self._dim, self._dim):
            raise ValueError("it was of another dimension")
        self._arrays = {name: state.tensors[name].numpy().copy() for name in _ARRAYS}
        self._numbers = {name: plain[name] for name in _NUMBERS}
        self._sampled = int(plain["sampled"])


class CMAES(Continuous):
    """Searches with `CovarianceMatrixAdaptation`."""

    Settings: ClassVar[type[SearchSettings]] = CMAESSettings

    @classmethod
    def make_strategy(cls, settings: Any, seed: int) -> Strategy:
        """See `Continuous.make_strategy`."""
        return CovarianceMatrixAdaptation(settings.dim, settings.sigma, settings.population, seed)


def _part(strategy: Any, name: str) -> Any:
    return getattr(strategy, name) if name else strategy


def _package() -> Any:
    """The `cma` package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import cma
    except ImportError as error:
        raise InputError(
            "search.type: cmaes needs the cma package, which is not installed; run "
            "`pip install 'rlprompt[search]'`"
        ) from error
    return cma
