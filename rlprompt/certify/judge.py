"""A bound on the true rate from the verdicts of a judge that errs, with its errors uncertain too.

A judge flags a failure with probability s (its sensitivity) and anything else with probability f
(one minus its specificity). At a true rate r it flags q = r s + (1 - r) f of the answers. Neither s
nor f is known: people have labelled some answers, and the judge flagged some of those. Plugging in
the measured shares, as Rogan and Gladen 1978 do, forgets that they are uncertain; a bound for each
of the three at a third of delta remembers it and gives much away, because all three are then at
their worst at once.

Here the three counts are tested jointly. For a pair (s, f) and the limit r, each count has an exact
binomial p-value against what the pair says: few flagged answers (q would be larger), many flagged
failures (s would be lower), many flagged good answers (f would be lower). Independent p-values are
combined as Lancaster 1961 does: each becomes a gamma variable whose shape is its share of the
variance, the sum is gamma with the total shape, whatever the pair. The claim "the rate is at least
r" is refuted when every pair is: the p-value is the largest over a grid whose cells are bounded by
their corners, so that nothing between grid points is missed. Pairs outside of a confidence set of
level `_OUTSIDE` are left out, and that level is added (Berger and Boos 1994). So the bound holds
for finite n and every (s, f).

Assumes: answers and labels are independent draws; people are right; the judge errs on the labelled
answers with the same two probabilities as on those that are certified (label answers of the same
kind of queries, and of the prompts in question). One completion per query. Broken by a judge whose
errors depend on the prompt, by labels chosen because the judge was unsure, by labels that the
judge was tuned on. Where the labelled answers are a random sample of those that are certified, the
exact bound from the labels alone is nearly as sharp and assumes nothing of the judge: use that.

Letters: S cells of sensitivity, F cells of the false-alarm rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from rlprompt.certify.bounds import Interval, binomial_p_value, clopper_pearson, upper_bound

Array = NDArray[np.float64]

_OUTSIDE = 1e-6
"""Probability that sensitivity or false-alarm rate lie outside of what is searched."""
_CELLS_PER_DEVIATION = 8
"""Cells per standard deviation of a measured share; sharpness is lost by at most one cell."""
_TOLERANCE = 1e-5
"""How far a bound may lie above the largest rate that is not refuted."""
_LEAST_TOTAL, _MOST_TOTAL = 3.0, 20.0
"""Limits of the total shape; see `_total_shape`."""
_LEAST_SHAPE = 1e-3
"""A count with less than this is left out: its gamma variable is 0 but for a rare moment."""


@dataclass(frozen=True)
class JudgeLabels:
    """How a judge did on answers that people have labelled."""

    flagged_failures: int
    """Failures by the label that the judge flagged."""
    failures: int
    """Failures by the label."""
    flagged_others: int
    """Other answers that the judge flagged."""
    others: int
    """Other answers."""

    def __post_init__(self) -> None:
        """Refuse counts that cannot be."""
        for flagged, of in (
            (self.flagged_failures, self.failures),
            (self.flagged_others, self.others),
        ):
            if of < 1 or not 0 <= flagged <= of:
                raise ValueError(
                    f"{flagged} flagged of {of} labelled answers of a kind cannot be used; both "
                    "kinds need at least one"
                )

    def sensitivity(self, delta: float) -> Interval:
        """Exact interval for the share of failures that the judge flags.

        Args:
            delta: probability with which it may miss.
        """
        return clopper_pearson(self.flagged_failures, self.failures, delta)

    def false_alarms(self, delta: float) -> Interval:
        """Exact interval for the share of other answers that the judge flags.

        Args:
            delta: probability with which it may miss.
        """
        return clopper_pearson(self.flagged_others, self.others, delta)


class _Cells(NamedTuple):
    """Pairs of error rates in question, flattened: the evidence against each from the labels."""

    lowest_rate: Array
    """[S F] the lowest rate of flagged answers in the cell."""
    shape: Array
    """[S F] the gamma shape of the count of flagged answers."""
    evidence: Array
    """[S F] what the labels say against the cell, as a sum of gamma variables."""
    total: Array
    """[S F] the shape of the sum of all three."""


class _Side(NamedTuple):
    """Cells of one share of flagged labels."""

    low: Array
    high: Array
    middle: Array
    p_value: Array
    """The exact p-value of "the share is at most `high`"."""


@dataclass(frozen=True)
class JudgedRate:
    """The true rate behind `n` verdicts of a judge with some labels; see the module."""

    labels: JudgeLabels
    n: int
    """How many answers the judge has seen, one per query; those with a label not among them."""

    def p_value(self, flagged: int, limit: float) -> float:
        """The p-value for "the true rate is at least the limit".

        Args:
            flagged: number of answers that the judge flagged.
            limit: true rate that is to be refuted.
        """
        if limit <= 0.0 or flagged >= self.n:
            return 1.0
        cells = self._cells(min(1.0, limit))
        own = special.gammainccinv(
            cells.shape, binomial_p_value(flagged, self.n, cells.lowest_rate)
        )
        combined = special.gammaincc(cells.total, own + cells.evidence)
        return min(1.0, float(np.max(combined)) + _OUTSIDE)

    def upper(self, flagged: int, delta: float) -> float:
        """The one-sided upper bound of the true rate.

        Args:
            flagged: number of answers that the judge flagged.
            delta: probability with which the bound may be too low.
        """
        return upper_bound(lambda limit: self.p_value(flagged, limit), delta, _TOLERANCE)

    def most_flagged(self, limit: float, delta: float) -> int:
        """The most flagged answers with which a limit can be certified; -1 when none is too many.

        Args:
            limit: true rate that is to be certified.
            delta: probability with which the certificate may be false.
        """
        if limit <= 0.0 or delta <= _OUTSIDE:
            return -1
        cells = self._cells(min(1.0, limit))
        needed = special.gammainccinv(cells.total, delta - _OUTSIDE) - cells.evidence
        bar = special.gammaincc(cells.shape, np.maximum(needed, 0.0))
        low, high = -1, self.n - 1
        while low < high:
            middle = (low + high + 1) // 2
            refuted = bool((binomial_p_value(middle, self.n, cells.lowest_rate) <= bar).all())
            low, high = (middle, high) if refuted else (low, middle - 1)
        return low

    def limit_of_labels(self, flagged: int, delta: float) -> float:
        """The bound that remains if the same share were flagged of endlessly many answers.

        What is left is owed to the labels alone: where it is above a limit, more queries cannot
        help, and more labels or a better judge can.

        Args:
            flagged: number of answers that the judge flagged.
            delta: probability with which the bound may be too low.
        """
        many = 10_000_000
        endless = JudgedRate(self.labels, many)
        return endless.upper(round(flagged / self.n * many), delta)

    @cached_property
    def _sensitivity(self) -> _Side:
        return _side(self.labels.flagged_failures, self.labels.failures)

    @cached_property
    def _false_alarms(self) -> _Side:
        return _side(self.labels.flagged_others, self.labels.others)

    def _cells(self, limit: float) -> _Cells:
        """What each pair of error rates in question says at a limit."""
        s, f = self._sensitivity, self._false_alarms
        # Where a judge flags failures less than the rest, higher rates are flagged less often.
        lowest = np.minimum(
            limit * s.low[:, None] + (1 - limit) * f.low[None, :], s.low[:, None]
        )  # [S, F]
        q = limit * s.middle[:, None] + (1 - limit) * f.middle[None, :]
        of_rate = q * (1 - q) / self.n
        failures, others = self.labels.failures, self.labels.others
        of_s = limit**2 * (s.middle * (1 - s.middle) / failures)[:, None]
        of_f = (1 - limit) ** 2 * (f.middle * (1 - f.middle) / others)[None, :]
        whole = of_rate + of_s + of_f
        total = _total_shape(
            q * (1 - q) * self.n,
            (s.middle * (1 - s.middle) * failures)[:, None],
            (f.middle * (1 - f.middle) * others)[None, :],
        )
        shape, shape_s, shape_f = (total * part / whole for part in (of_rate, of_s, of_f))
        evidence = _gamma(shape_s, s.p_value[:, None]) + _gamma(shape_f, f.p_value[None, :])
        shape = np.maximum(shape, 1e-12)  # the functions of a gamma variable want some
        return _Cells(lowest.ravel(), shape.ravel(), evidence.ravel(), total.ravel())


def _total_shape(*variances: Array) -> Array:
    """The shape of the sum: that of Fisher's combination where a count is nearly fixed at 0 or all.

    A larger one comes nearer to a sum of normal deviates, which is the sharpest combination where
    counts vary much; a count of 0, which says nothing against a cell, then weighs more heavily.
    """
    least = np.minimum(np.minimum(variances[0], variances[1]), variances[2])
    return np.asarray(np.minimum(_LEAST_TOTAL + least, _MOST_TOTAL))


def _gamma(shape: Array, p_value: Array) -> Array:
    """The gamma variable of a p-value; nothing where its share of the variance is nothing."""
    some = np.maximum(shape, _LEAST_SHAPE)
    return np.where(shape > _LEAST_SHAPE, special.gammainccinv(some, p_value), 0.0)


def _side(flagged: int, of: int) -> _Side:
    """The cells that a count of flagged labels leaves in question.

    The grid depends on what is fixed before anything is flagged, never on what was flagged: the
    shapes of the gamma variables must be the same whatever the data are.

    Args:
        flagged: number of labelled answers of a kind that were flagged.
        of: number of labelled answers of that kind.
    """
    count = math.ceil(math.pi * math.sqrt(of) * _CELLS_PER_DEVIATION)
    angles = np.linspace(0.0, math.pi / 2, count + 1)
    edges, middle = np.sin(angles) ** 2, np.sin((angles[1:] + angles[:-1]) / 2) ** 2
    inside = clopper_pearson(flagged, of, _OUTSIDE / 2)
    kept = (edges[1:] >= inside.low) & (edges[:-1] <= inside.high)
    low, high = edges[:-1][kept], edges[1:][kept]
    # P(Binomial(of, high) >= flagged)
    p_value = np.ones_like(high) if flagged == 0 else special.bdtrc(flagged - 1, of, high)
    return _Side(low, high, middle[kept], p_value)
