"""How good candidates are by all that was seen of them, and which of them none surpasses.

Candidates are tried on different queries, and a query's difficulty moves its scores more than a
candidate does. So what a candidate is worth is estimated beside what its queries are worth:

    score of candidate c in block b  =  level of b + effect of c + noise

A block is one query in one step, where all candidates meet the same draws. An effect is pulled
towards the mean of its parents' effects as strongly as `pull` blocks would pull it (a Gaussian
prior along the lineage, best linear unbiased prediction: Henderson, Biometrics 1975): a newcomer
is thought to be like its parents until its own scores say more, and so the best of many newcomers
is not the luckiest one.

Letters: M scores, C candidates, B blocks, K objectives. Pure functions of arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

PULLS = (1.0, 4.0, 16.0, 64.0)
"""Blocks that a prior may be worth: how much noisier a score is than children differ from their
parents, as a ratio of variances."""


class Effects(NamedTuple):
    """Effects of C candidates; only differences mean something."""

    mean: Array
    """[C]"""
    precision: Array
    """[C, C] inverse of their covariance, in units of the noise's variance."""
    noise: float
    """Variance of a score about its level and effect."""

    def deviation(self, one: int, other: int) -> float:
        """Standard deviation of what one candidate is believed to be better than another."""
        contrast = np.zeros(len(self.mean))
        contrast[one] += 1.0
        contrast[other] -= 1.0
        variance = self.noise * float(contrast @ np.linalg.solve(self.precision, contrast))
        return math.sqrt(max(variance, 0.0))


def effects(
    candidates: ArrayLike,
    blocks: ArrayLike,
    scores: ArrayLike,
    parents: Sequence[Sequence[int]],
    pull: float | None = None,
) -> Effects:
    """What each candidate is worth, in units of the scores; see the module.

    Args:
        candidates: int [M], the candidate of each score, below C.
        blocks: int [M], the block of each score, any numbers.
        scores: float [M]; NaN = not known, which is left out.
        parents: the parents of each of the C candidates, all of them before it; without any, it is
            pulled towards zero.
        pull: number of blocks that the prior is worth, above 0; None = the most likely of `PULLS`,
            by restricted maximum likelihood (Patterson and Thompson, Biometrika 1971).
    """
    values = np.asarray(scores, dtype=np.float64).reshape(-1)
    known = ~np.isnan(values)
    values = values[known]
    number = np.asarray(candidates, dtype=np.int64).reshape(-1)[known]  # [M]
    size = len(parents)
    if not len(values):
        return Effects(np.zeros(size), np.eye(size), 0.0)
    block = np.unique(np.asarray(blocks).reshape(-1)[known], return_inverse=True)[1]
    counts = np.bincount(block).astype(np.float64)  # [B]
    incidence = np.zeros((len(counts), size))
    np.add.at(incidence, (block, number), 1.0)
    centred = values - (np.bincount(block, weights=values) / counts)[block]
    matrix = np.diag(incidence.sum(0)) - incidence.T @ (incidence / counts[:, None])  # [C, C]
    right = np.bincount(number, weights=centred, minlength=size)
    prior = np.eye(size)
    for child, above in enumerate(parents):
        for parent in above:
            prior[child, parent] -= 1.0 / len(above)
    precision = prior.T @ prior
    freedom = len(values) - len(counts)
    found = [
        _solved(matrix + each * precision, right, float(centred @ centred), freedom, each)
        for each in (PULLS if pull is None else (pull,))
    ]
    return max(found, key=lambda pair: pair[0])[1]


def _solved(
    matrix: Array, right: Array, total: float, freedom: int, pull: float
) -> tuple[float, Effects]:
    """Log-likelihood, up to a constant, and effects, where the prior is worth `pull` blocks."""
    lower = np.linalg.cholesky(matrix)
    mean = np.linalg.solve(matrix, right)
    left = max(total - float(right @ mean), 1e-12 * max(total, 1e-12))
    # The prior's own matrix is triangular with ones on its diagonal, so its determinant is 1.
    volume = 0.5 * len(right) * np.log(pull) - float(np.log(np.diag(lower)).sum())
    likelihood = volume - 0.5 * freedom * float(np.log(left))
    return likelihood, Effects(mean, matrix, left / max(freedom, 1))


def front_ranks(points: Array) -> NDArray[np.int64]:
    """In which front each point stands: 0 where no other point is as good in all and better in one.

    Front 1 is front 0 of what remains without it, and so on (non-dominated sorting: Deb et al.,
    NSGA-II, IEEE TEC 2002).

    Args:
        points: [C, K], more is better; NaN counts as worst.

    Returns:
        int [C].
    """
    values = np.where(np.isnan(points), -np.inf, points)
    no_worse = (values[:, None, :] >= values[None, :, :]).all(2)
    better = (values[:, None, :] > values[None, :, :]).any(2)
    dominates = no_worse & better  # [C, C] row over column
    ranks = np.full(len(values), -1, dtype=np.int64)
    rank = 0
    while (ranks < 0).any():
        left = ranks < 0
        ranks[left & ~dominates[left].any(0)] = rank
        rank += 1
    return ranks


def crowding(points: Array) -> Array:
    """How far apart a front's points lie from their neighbours; the ends of an objective inf.

    Args:
        points: [C, K] of one front.

    Returns:
        [C], more = lonelier (Deb et al., NSGA-II).
    """
    count, objectives = points.shape
    distance = np.zeros(count)
    for column in range(objectives):
        order = np.argsort(points[:, column], kind="stable")
        ordered = points[order, column]
        width = ordered[-1] - ordered[0]
        distance[order[[0, -1]]] = np.inf
        if count > 2 and width > 0.0:
            distance[order[1:-1]] += (ordered[2:] - ordered[:-2]) / width
    return distance
