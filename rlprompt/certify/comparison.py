"""Means and differences of prompts that met the same queries, with the query as the unit.

Completions of one query are alike: they share what is easy or hard about it. An error that counts
them as independent is too small (by a fifth on the quickstart's held-out queries), so everything
here first averages over a query's completions and then looks at how queries differ (a cluster mean;
Miller, "Adding Error Bars to Evals", 2024, arXiv 2411.00640, section 2.2). Prompts are compared
query by query and draw by draw (the same section, on paired differences).

Assumed: the queries are an independent sample of those that the prompt will meet. What breaks it: a
shifted distribution, queries that are variants of each other, and choosing the prompt on the same
queries, for which `num_compared` corrects.

Letters: Q queries, n completions per query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Scores = NDArray[np.float64]
"""[Q, n] values of one prompt; NaN = could not be scored. Row i is query i, column j its draw j."""

CONFIDENCE = 0.95
_RESAMPLES = 20_000
"""Sign patterns that are drawn where there are too many to try all."""

Outcome = Literal["better", "worse", "same", "unclear"]
"""`same`: not one value differs. `unclear`: the sample is compatible with no difference."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    value: float
    """The mean over queries."""
    low: float
    """Lower end; -inf from fewer than two queries."""
    high: float
    """Upper end; inf from fewer than two queries."""
    num_queries: int
    """Q, those with a known value."""
    confidence: float = CONFIDENCE
    """Probability that the procedure covers the true mean, for all that were compared together."""


@dataclass(frozen=True)
class Difference:
    """How far one prompt is above another on the same queries."""

    interval: Interval
    """Of the mean difference."""
    p_value: float
    """Two-sided, of the sign-flip test; 1.0 from no query."""
    num_compared: int
    """How many prompts the better one was chosen from on these queries; 1 = none was chosen."""
    outcome: Outcome
    """What may be said at the interval's confidence."""


def query_means(scores: Scores) -> NDArray[np.float64]:
    """[Q]: mean of each query's known values, NaN where none is known."""
    known = ~np.isnan(scores)
    count = known.sum(axis=1)
    total = np.where(known, scores, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def standard_error(scores: Scores) -> float:
    """Standard error of the mean over queries; NaN from fewer than two."""
    means = query_means(scores)
    means = means[~np.isnan(means)]
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan


def mean_interval(
    scores: Scores, *, confidence: float = CONFIDENCE, num_compared: int = 1
) -> Interval:
    """Mean over queries with Student's t interval.

    It is exact for normal query means and close for many queries; where all queries have one value
    it has no width, which says nothing about other queries: bound a rate with a method for bounded
    means instead.

    Args:
        scores: values of one prompt, [Q, n].
        confidence: probability of covering, in (0, 1).
        num_compared: number of intervals that shall cover together (Bonferroni).
    """
    return _interval(query_means(scores), confidence, num_compared)


def paired_difference(
    ours: Scores, theirs: Scores, *, confidence: float = CONFIDENCE, num_compared: int = 1
) -> Difference:
    """How far `ours` is above `theirs`: t interval and sign-flip test over queries.

    The values are paired by query and draw where both have as many draws, else by query. A
    difference counts as `better` or `worse` only where the interval excludes 0 and the sign-flip
    test agrees: the t interval alone is too narrow for few or heavy-tailed queries (three queries
    that all gained 0.1 have an interval without width and a p-value of 0.25).

    Args:
        ours: values of one prompt, [Q, n].
        theirs: values of the other on the same queries, [Q, m].
        confidence: probability of covering, in (0, 1).
        num_compared: number of prompts that `ours` was chosen from on these very queries; the error
            is divided by it (Bonferroni), which holds for any way of choosing.

    Raises:
        ValueError: the prompts did not meet the same number of queries.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} queries cannot be paired with {len(theirs)}")
    if ours.shape == theirs.shape:
        differences = query_means(ours - theirs)
    else:
        differences = query_means(ours) - query_means(theirs)
    interval = _interval(differences, confidence, num_compared)
    known = differences[~np.isnan(differences)]
    p_value = sign_flip_test(known)
    alpha = (1.0 - confidence) / num_compared
    outcome: Outcome = "unclear"
    if len(known) and not known.any():
        outcome = "same"
    elif p_value <= alpha and interval.low > 0.0:
        outcome = "better"
    elif p_value <= alpha and interval.high < 0.0:
        outcome = "worse"
    return Difference(interval, p_value, num_compared, outcome)


def sign_flip_test(differences: NDArray[np.float64]) -> float:
    """Two-sided p-value that paired differences are symmetric about 0 (Fisher 1935).

    It needs no distribution: under the hypothesis the sign of each query's difference is a fair
    coin. All sign patterns are tried where there are at most 20,000, else as many are drawn with a
    fixed seed.

    Args:
        differences: mean difference of each query, [Q], without NaN.
    """
    if len(differences) < 2 or not differences.any():
        return 1.0
    result = stats.permutation_test(
        (differences,),
        lambda values, axis: np.mean(values, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def _interval(values: NDArray[np.float64], confidence: float, num_compared: int) -> Interval:
    known = values[~np.isnan(values)]
    if not len(known):
        return Interval(math.nan, -math.inf, math.inf, 0, confidence)
    mean = float(known.mean())
    if len(known) == 1:
        return Interval(mean, -math.inf, math.inf, 1, confidence)
    error = float(known.std(ddof=1)) / math.sqrt(len(known))
    tail = (1.0 - confidence) / (2.0 * num_compared)
    reach = float(stats.t.isf(tail, len(known) - 1)) * error
    return Interval(mean, mean - reach, mean + reach, len(known), confidence)
