"""Means and paired differences with bounds that hold for small sets too.

`certify.comparison` gives t intervals and sign-flip tests over queries. Two cases need more: a rate
of yes or no has an exact interval (Clopper-Pearson), and where all queries agree a t interval has
no width, though another query may differ. There the share of queries that differ is bounded: none
of Q did, so it is at most u (Clopper-Pearson), and values between 0 and 1 then bound the mean.

Letters: Q queries or items, n values of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlprompt.certify.bounds import clopper_pearson, clopper_pearson_upper
from rlprompt.certify.comparison import (
    CONFIDENCE,
    Interval,
    Outcome,
    Scores,
    mean_interval,
    paired_difference,
    query_means,
)


@dataclass(frozen=True)
class Stated:
    """A number with its bounds."""

    value: float
    low: float
    """Lower bound, -inf where there is none."""
    high: float
    """Upper bound, inf where there is none."""
    num_queries: int
    num_compared: int = 1
    """Numbers whose bounds hold together."""
    outcome: Outcome | None = None
    """Of a difference."""

    def plain(self) -> dict[str, Any]:
        """As JSON values; what is not finite becomes null."""
        found: dict[str, Any] = {
            "value": _finite(self.value),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "num_queries": self.num_queries,
            "num_compared": self.num_compared,
        }
        return found if self.outcome is None else {**found, "outcome": self.outcome}


def stated_mean(scores: Scores, is_share: bool | None = None) -> Stated:
    """The mean over queries with its 95% bounds.

    Args:
        scores: [Q, n] values, NaN = unknown.
        is_share: whether values are between 0 and 1 whatever happens; None = they are taken to be
            if all that are known are.
    """
    bounded = _in_unit(scores) if is_share is None else is_share
    interval = mean_interval(scores)
    means = query_means(scores)
    means = means[~np.isnan(means)]
    if bounded and len(means) and set(means.tolist()) <= {0.0, 1.0} and _is_single(scores):
        exact = clopper_pearson(int(means.sum()), len(means), 1.0 - CONFIDENCE)
        return Stated(interval.value, exact.low, exact.high, len(means))
    return _widened(interval, means, 1, 0.0 if bounded else -math.inf)


def stated_difference(
    ours: Scores, theirs: Scores, num_compared: int = 1, is_share: bool | None = None
) -> Stated:
    """How far `ours` is above `theirs` on the same queries, with bounds that hold together at 95%.

    Args:
        ours: [Q, n] values.
        theirs: [Q, m] values of the same queries.
        num_compared: number of differences that are looked at together (Bonferroni).
        is_share: whether values are between 0 and 1, as of `stated_mean`.
    """
    bounded = (_in_unit(ours) and _in_unit(theirs)) if is_share is None else is_share
    difference = paired_difference(ours, theirs, num_compared=num_compared)
    if ours.shape == theirs.shape:
        gaps = query_means(ours - theirs)
    else:
        gaps = query_means(ours) - query_means(theirs)
    gaps = gaps[~np.isnan(gaps)]
    lowest = -1.0 if bounded else -math.inf
    found = _widened(difference.interval, gaps, num_compared, lowest)
    return Stated(
        found.value, found.low, found.high, found.num_queries, num_compared, difference.outcome
    )


def _widened(interval: Interval, means: Scores, num_compared: int, lowest: float) -> Stated:
    """Bounds where all queries agree; the range of their values is [lowest, 1]."""
    low, high = interval.low, interval.high
    if len(means) > 1 and not np.ptp(means) > 0.0:
        share = clopper_pearson_upper(0, len(means), (1.0 - CONFIDENCE) / (2.0 * num_compared))
        highest = 1.0 if math.isfinite(lowest) else math.inf
        low = interval.value - share * (interval.value - lowest)
        high = interval.value + share * (highest - interval.value)
    return Stated(interval.value, low, high, interval.num_queries, num_compared)


def _in_unit(scores: Scores) -> bool:
    known = scores[~np.isnan(scores)]
    return bool(((known >= 0.0) & (known <= 1.0)).all())


def _is_single(scores: Scores) -> bool:
    """Whether no query has more than one known value, so that queries are single trials."""
    return bool(((~np.isnan(scores)).sum(axis=1) <= 1).all())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
