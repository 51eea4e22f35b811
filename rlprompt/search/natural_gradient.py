"""An exponential natural evolution strategy: draws, and the update of mean, size and shape.

Glasmachers et al., "Exponential natural evolution strategies", GECCO 2010, algorithm xNES, with
antithetic pairs: for every draw z there is one of -z, which takes the part of the reward that does
not change with the sign out of the estimate of the mean's gradient (Salimans et al., 2017, arXiv
1703.03864, section 2.1). It has the full covariance because the coordinates of a subspace mean
nothing: what it does is the same in all of its bases.

Candidates are drawn at `mean + size * z @ shape`, where `shape` is symmetric of determinant 1.

Letters: C candidates, an even number; d dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def antithetic(pairs: int, dim: int, seed: int, generation: int) -> Tensor:
    """Standard normal draws and their opposites, a function of seed and generation.

    Args:
        pairs: number of pairs, C / 2.
        dim: number of coordinates, d.
        seed: seed of the search.
        generation: number of the generation.

    Returns:
        float64 [C, d]; row 2 i + 1 is the opposite of row 2 i.
    """
    drawn = np.random.default_rng([seed, generation]).standard_normal((pairs, dim))
    half = torch.from_numpy(drawn)
    return torch.stack([half, -half], dim=1).reshape(2 * pairs, dim)


def size_rate(dim: int) -> float:
    """The learning rate of the size, (3 + ln d) / (5 sqrt(d)).

    It is that of the deviations in SNES (Schaul et al., GECCO 2011): one number is estimated from
    d coordinates at least as well as each of them, and xNES's own rate, that of the shape, would
    leave the size where it began in the few generations that a prompt can be given.

    Args:
        dim: number of dimensions, d.
    """
    return (3.0 + math.log(dim)) / (5.0 * math.sqrt(dim))


def shape_rate(dim: int) -> float:
    """The learning rate of the shape, 3 (3 + ln d) / (5 d sqrt(d)): xNES's own, its table 1.

    Args:
        dim: number of dimensions, d.
    """
    return 3.0 * (3.0 + math.log(dim)) / (5.0 * dim * math.sqrt(dim))


@dataclass(frozen=True)
class Normal:
    """A normal distribution of covariance `size ** 2 * shape @ shape`."""

    mean: Tensor
    """float64 [d]."""
    size: float
    """Geometric mean of the standard deviations along the principal axes."""
    shape: Tensor
    """float64 [d, d], symmetric, positive, of determinant 1."""

    def points(self, draws: Tensor) -> Tensor:
        """What standard normal draws [C, d] become."""
        return self.mean + self.size * draws @ self.shape


@dataclass(frozen=True)
class Rates:
    """The learning rates of a normal distribution."""

    mean: float
    """1 goes to the weighted mean of the draws."""
    size: float
    """Of the logarithm of the size."""
    shape: float
    """Of the logarithm of the shape."""


def xnes_update(old: Normal, draws: Tensor, weights: Tensor, rates: Rates) -> Normal:
    """One natural gradient step; equations 9 to 14 of the source.

    Args:
        old: distribution that was drawn from, which is not changed.
        draws: [C, d] standard normal; candidate k was tried at `old.points(draws)[k]`.
        weights: [C] utilities of sum 0.
        rates: learning rates.
    """
    dim = draws.shape[1]
    towards = weights @ draws
    spread = draws.T @ (weights[:, None] * draws)  # the sum of weights is 0: nothing to take off
    growth = float(spread.trace()) / dim
    turned = spread - growth * torch.eye(dim, dtype=spread.dtype)
    whole = old.shape @ torch.linalg.matrix_exp(rates.shape * turned) @ old.shape
    return Normal(
        old.mean + rates.mean * old.size * towards @ old.shape,
        old.size * math.exp(0.5 * rates.size * growth),
        _symmetric_root(whole),
    )


def _symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric, positive root of a symmetric, positive matrix, scaled to determinant 1."""
    values, axes = torch.linalg.eigh((matrix + matrix.T) / 2)
    logs = values.clamp_min(1e-300).log() / 2
    root: Tensor = (axes * (logs - logs.mean()).exp()) @ axes.T
    return root
