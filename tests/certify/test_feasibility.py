"""What n can certify: the numbers that the literature gives, and agreement with the bounds."""

from __future__ import annotations

import pytest

from rlprompt.certify.bounds import binomial_p_value, clopper_pearson_upper
from rlprompt.certify.feasibility import (
    least_abstention,
    most_failures,
    power,
    queries_for_power,
    queries_needed,
    smallest_limit,
)


@pytest.mark.parametrize(("limit", "n"), [(0.05, 59), (0.02, 149), (0.01, 299), (0.001, 2995)])
def test_queries_without_a_failure(limit: float, n: int) -> None:
    assert queries_needed(limit, 0.05) == n
    assert smallest_limit(n, 0.05) <= limit < smallest_limit(n - 1, 0.05)
    assert smallest_limit(n, 0.05) == pytest.approx(clopper_pearson_upper(0, n, 0.05))


@pytest.mark.parametrize(
    ("n", "limit", "most"), [(520, 0.05, 17), (520, 0.02, 4), (520, 0.01, 1), (2000, 0.01, 12)]
)
def test_failures_allowed(n: int, limit: float, most: int) -> None:
    assert most_failures(n, limit, 0.05) == most
    assert clopper_pearson_upper(most, n, 0.05) <= limit
    assert clopper_pearson_upper(most + 1, n, 0.05) > limit


def test_what_no_number_certifies() -> None:
    assert queries_needed(0.0, 0.05) is None
    assert queries_for_power(0.1, 0.05, rate=0.1) is None
    assert most_failures(20, 0.1, 0.05) == -1
    assert power(20, 0.1, 0.05, rate=0.0) == 0.0


def test_queries_for_power_reach_it() -> None:
    n = queries_for_power(0.1, 0.05, rate=0.02, wanted=0.9)
    assert n is not None and power(n, 0.1, 0.05, 0.02) >= 0.9
    most = most_failures(n, 0.1, 0.05)
    assert power(n, 0.1, 0.05, 0.02) == pytest.approx(float(binomial_p_value(most, n, 0.02)))


def test_abstention_where_the_rate_is_too_high() -> None:
    assert least_abstention(1, 100, 0.1, 0.05) == 0.0
    assert 0.2 < least_abstention(40, 100, 0.1, 0.05) < 0.34
