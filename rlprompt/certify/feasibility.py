"""What a number of queries can certify, before any is spent; and what no number can.

With no failure at all, n queries give the bound 1 - delta^(1/n), and no valid bound that knows
nothing but the losses gives less: a rate of just that size shows no failure with probability delta.
So a limit below it cannot be certified with n queries by anything. Limits that no n certifies: one
below what a shift alone adds, and one below the rate itself, where the only way out is to abstain
(arXiv 2606.29054: a share (rate - limit) / (1 - limit) of the queries at least).
"""

from __future__ import annotations

import math

from scipy import special

from rlprompt.certify.bounds import binomial_p_value, clopper_pearson_lower

_MOST = 10**9


def smallest_limit(n: int, delta: float) -> float:
    """The smallest rate that n queries can certify: that of no failure at all.

    Args:
        n: number of queries.
        delta: probability with which the certificate may be false, after correction for the number
            of candidates (delta / K for K of them).
    """
    return -math.expm1(math.log(delta) / n)


def queries_needed(limit: float, delta: float) -> int | None:
    """The fewest queries that can certify a limit, when none of them fails; None = no number can.

    Args:
        limit: rate to be certified, under the distribution that is sampled: `Shift.base_limit`
            gives it where another is meant.
        delta: probability with which the certificate may be false; see `smallest_limit`.
    """
    if limit <= 0.0:
        return None
    if limit >= 1.0:
        return 1
    count = math.ceil(math.log(delta) / math.log1p(-limit) - 1e-9)
    return max(1, count)


def most_failures(n: int, limit: float, delta: float) -> int:
    """The most failures of n with which a limit can be certified; -1 when even none is too many.

    Args:
        n: number of queries.
        limit: rate to be certified.
        delta: probability with which the certificate may be false; see `smallest_limit`.
    """
    low, high = -1, n - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if binomial_p_value(middle, n, limit) <= delta else (low, middle - 1)
        )
    return low


def power(n: int, limit: float, delta: float, rate: float) -> float:
    """The probability that n queries certify a limit when the rate is lower.

    Args:
        n: number of queries.
        limit: rate to be certified.
        delta: probability with which the certificate may be false; see `smallest_limit`.
        rate: true rate.
    """
    most = most_failures(n, limit, delta)
    return 0.0 if most < 0 else float(binomial_p_value(most, n, rate))


def queries_for_power(limit: float, delta: float, rate: float, wanted: float = 0.8) -> int | None:
    """How many queries certify a limit with the wanted probability; None = no number does.

    Found by doubling and halving: power falls a little between the numbers at which one more
    failure is allowed, so that a slightly smaller number may do.

    Args:
        limit: rate to be certified.
        delta: probability with which the certificate may be false; see `smallest_limit`.
        rate: true rate that is hoped for.
        wanted: probability with which the certificate is to come out.
    """
    first = queries_needed(limit, delta)
    if first is None or rate >= limit:
        return None
    low, high = first - 1, first
    while power(high, limit, delta, rate) < wanted:
        low, high = high, 2 * high
        if high > _MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, limit, delta, rate) >= wanted else (middle, high)
    return high


def least_abstention(failures: int, n: int, limit: float, delta: float) -> float:
    """The share of queries that a prompt must leave unanswered for its limit to be true.

    From the lower bound of the rate: where that is above the limit, the claim is false except with
    probability delta, and no method and no n can certify it.

    Args:
        failures: number of failures that were seen.
        n: number of queries.
        limit: rate that was to be certified.
        delta: probability with which the share may be too high.
    """
    rate = clopper_pearson_lower(failures, n, delta)
    return 0.0 if limit >= 1.0 else max(0.0, (rate - limit) / (1.0 - limit))


def wrong_best_of(num_compared: int, n: int, rate: float, delta: float) -> float:
    """How often the best of equal prompts "certifies" less than their rate without a correction.

    The figure behind `num_compared`: best of 50 at 10%, n = 100, delta 0.05 gives 0.70.

    Args:
        num_compared: number of independent prompts, all of one rate.
        n: number of queries.
        rate: rate of each.
        delta: probability with which the plain bound of one prompt may be too low.
    """
    most = most_failures(n, rate, delta)
    one = 0.0 if most < 0 else float(special.bdtr(most, n, rate))
    return -math.expm1(num_compared * math.log1p(-one))
