"""Finite-sample bounds on the mean of losses that lie in [0, 1], and the p-values behind them.

One loss per query, and queries drawn independently from one distribution: the query is the unit.
Several completions of a query are averaged into its loss before anything here sees them; one drawn
completion makes the loss 0 or 1. The rate that is bounded is then the mean over queries *and* over
the model's draws.

Every p-value here is for the claim that the mean is *at least* a limit: when it is below delta, the
mean is below the limit except with probability delta. All grow with the limit, so that the upper
bound is the largest limit that is not refuted.

Letters: n queries, J bets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]

BETS: Array = np.sin(np.pi * (np.arange(20) + 0.5) / 40) ** 2
"""[J] shares of the largest bet that cannot lose everything. Their mixture needs no tuning: it is
dense at both ends, where few failures and small excesses are best bet on."""


class Interval(NamedTuple):
    """Two limits."""

    low: float
    high: float


def clopper_pearson_upper(failures: int, n: int, delta: float) -> float:
    """The one-sided upper limit for a rate: P(rate <= limit) >= 1 - delta.

    Clopper and Pearson 1934, by the beta quantile. Exact for independent draws of 0 or 1 with one
    rate, whatever n is; 0 failures give 1 - delta^(1/n). Broken by draws that are alike (several
    completions of one query) and by choosing what to bound after looking at the draws.

    Args:
        failures: number of draws that were 1.
        n: number of draws.
        delta: probability with which the limit may be too low.
    """
    _check(failures, n, delta)
    return (
        1.0 if failures == n else float(special.betaincinv(failures + 1, n - failures, 1 - delta))
    )


def clopper_pearson_lower(failures: int, n: int, delta: float) -> float:
    """The one-sided lower limit for a rate; see `clopper_pearson_upper`.

    Args:
        failures: number of draws that were 1.
        n: number of draws.
        delta: probability with which the limit may be too high.
    """
    return 1.0 - clopper_pearson_upper(n - failures, n, delta)


def clopper_pearson(failures: int, n: int, delta: float) -> Interval:
    """The two-sided interval for a rate, delta / 2 on each side; see `clopper_pearson_upper`.

    Args:
        failures: number of draws that were 1.
        n: number of draws.
        delta: probability with which the rate may lie outside.
    """
    return Interval(
        clopper_pearson_lower(failures, n, delta / 2), clopper_pearson_upper(failures, n, delta / 2)
    )


def binomial_p_value(failures: Any, n: Any, limit: Any) -> Any:
    """P(Binomial(n, limit) <= failures), the exact p-value for "the rate is at least the limit".

    Args:
        failures: number of draws that were 1, or an array of such numbers.
        n: number of draws, or an array.
        limit: rate, or an array of rates.

    Returns:
        The p-value, of the shape that the arguments broadcast to.
    """
    limit = np.clip(limit, 0.0, 1.0)
    return np.where(np.asarray(failures) >= n, 1.0, special.bdtr(failures, n, limit))


def hoeffding_bentkus_p_value(losses: Sequence[float] | Array, limit: float) -> float:
    """The p-value for "the mean is at least the limit" from the sample mean alone.

    The smaller of Hoeffding's relative-entropy bound and Bentkus's e times the binomial tail; Bates
    et al. 2021 (arXiv 2101.02703), equation 6. Valid for independent losses in [0, 1]. It knows no
    variance, so `betting_p_value` is tighter wherever losses are not all 0 or 1.

    Args:
        losses: [n] losses in [0, 1].
        limit: mean that is to be refuted.
    """
    values = checked_losses(losses)
    n, mean = len(values), float(values.mean())
    if mean >= limit:
        return 1.0
    entropy = special.rel_entr(mean, limit) + special.rel_entr(1 - mean, 1 - limit)
    # A sum that is whole but for rounding must not count as the next number of failures.
    count = math.ceil(n * mean - 1e-9)
    tail = float(binomial_p_value(count, n, limit))
    return min(1.0, math.exp(-n * entropy), math.e * tail)


def betting_p_value(losses: Sequence[float] | Array, limit: float) -> float:
    """The p-value for "the mean is at least the limit": one over the most that bets against it won.

    Waudby-Smith and Ramdas 2024 (JRSS-B 86, 1), with a fixed mixture of bets in place of one that
    is tuned: wealth = mean_j prod_i (1 + c_j (limit - x_i) / (1 - limit)). Under the claim no bet
    gains on average, so that the wealth ever reaches 1/delta with probability at most delta
    (Ville), however n was chosen. It uses the variance that losses have. Broken by losses of one
    query that are alike, by losses outside [0, 1], and by an order that was chosen by the losses.

    Args:
        losses: [n] losses in [0, 1], in the order in which they were drawn.
        limit: mean that is to be refuted.
    """
    values = checked_losses(losses)
    if limit <= 0.0:
        return 1.0
    if limit >= 1.0:
        return 1.0 if bool((values >= 1.0).all()) else 0.0
    gains = np.log1p(BETS * ((limit - values) / (1.0 - limit))[:, None])  # [n, J]
    wealth = special.logsumexp(np.cumsum(gains, axis=0), axis=1) - math.log(len(BETS))
    return float(np.exp(min(0.0, -float(wealth.max()))))


def upper_bound(p_value: Callable[[float], float], delta: float, tolerance: float = 1e-12) -> float:
    """The largest mean in [0, 1] that a p-value does not refute at delta.

    Args:
        p_value: function from a limit to the p-value of "the mean is at least the limit", which
            falls as the limit grows.
        delta: probability with which the bound may be too low.
        tolerance: how far above that mean the bound may lie; it never lies below.
    """
    low, high = 0.0, 1.0
    if p_value(high) > delta:
        return 1.0
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle) > delta else (low, middle)
    return high


def mean_upper(losses: Sequence[float] | Array, delta: float) -> float:
    """The one-sided upper bound of a mean, by betting; see `betting_p_value`.

    For losses that a rule makes 0 or 1 always, `clopper_pearson_upper` is tighter. Taking the
    smaller of the two would need half of delta for each: choose by the rule, not by the result.

    Args:
        losses: [n] losses in [0, 1].
        delta: probability with which the bound may be too low.
    """
    values = checked_losses(losses)
    return upper_bound(lambda limit: betting_p_value(values, limit), delta)


def mean_interval(losses: Sequence[float] | Array, delta: float) -> Interval:
    """The two-sided betting interval of a mean, delta / 2 on each side; see `betting_p_value`.

    Args:
        losses: [n] losses in [0, 1].
        delta: probability with which the mean may lie outside.
    """
    values = checked_losses(losses)
    return Interval(1.0 - mean_upper(1.0 - values, delta / 2), mean_upper(values, delta / 2))


def checked_losses(losses: Sequence[float] | Array) -> Array:
    """Losses as an array.

    Args:
        losses: [n] losses.

    Raises:
        ValueError: there is none, or one is not in [0, 1].
    """
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"losses have the shape {values.shape}; give one number per query")
    if not bool(((values >= 0.0) & (values <= 1.0)).all()):
        raise ValueError("a loss is not in [0, 1]; scale the losses, or count failures")
    return values


def _check(failures: int, n: int, delta: float) -> None:
    if n < 1 or not 0 <= failures <= n:
        raise ValueError(f"{failures} failures of {n} cannot be; count again")
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta is {delta}; choose it between 0 and 1")
