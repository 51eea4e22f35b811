"""Bounds of means and rates, against scipy, closed forms and simulated worlds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rlprompt.certify.bounds import (
    betting_p_value,
    binomial_p_value,
    clopper_pearson,
    clopper_pearson_upper,
    hoeffding_bentkus_p_value,
    mean_interval,
    mean_upper,
    upper_bound,
)


@pytest.mark.parametrize("n", [1, 7, 100, 1000])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_clopper_pearson_is_scipys(n: int, share: float) -> None:
    failures = round(share * n)
    theirs = stats.binomtest(failures, n).proportion_ci(0.9, method="exact")
    assert clopper_pearson(failures, n, 0.1) == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize("n", [1, 59, 299])
def test_no_failure_still_says_something(n: int) -> None:
    assert clopper_pearson_upper(0, n, 0.05) == pytest.approx(1 - 0.05 ** (1 / n))


def test_inverting_the_p_value_gives_the_bound() -> None:
    found = upper_bound(lambda limit: float(binomial_p_value(3, 50, limit)), 0.05)
    assert found == pytest.approx(clopper_pearson_upper(3, 50, 0.05), abs=1e-9)


@pytest.mark.parametrize("p_value", [betting_p_value, hoeffding_bentkus_p_value])
def test_p_values_grow_smaller_with_the_limit(p_value: Callable[..., float]) -> None:
    losses = np.random.default_rng(0).random(60) * 0.4
    values = [p_value(losses, limit) for limit in np.linspace(0.0, 1.0, 41)]
    assert values[0] == 1.0 and values[-1] < 1e-6
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values))


def test_hoeffding_bentkus_is_the_formula() -> None:
    losses, limit = [0.0] * 90 + [1.0] * 10, 0.25
    entropy = 0.1 * math.log(0.1 / 0.25) + 0.9 * math.log(0.9 / 0.75)
    expected = min(math.exp(-100 * entropy), math.e * stats.binom.cdf(10, 100, 0.25))
    assert hoeffding_bentkus_p_value(losses, limit) == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["coin", "beta", "few levels"])
def test_betting_is_wrong_at_most_as_often_as_it_says(shape: str) -> None:
    rng = np.random.default_rng(3)
    mean, worlds, n = 0.2, 1500, 60
    draws: dict[str, Callable[[], Any]] = {
        "coin": lambda: (rng.random(n) < mean).astype(float),
        "beta": lambda: rng.beta(0.4, 1.6, n),
        "few levels": lambda: rng.binomial(4, mean, n) / 4,
    }
    draw = draws[shape]
    wrong = sum(betting_p_value(draw(), mean) <= 0.1 for _ in range(worlds))
    assert wrong <= stats.binom.ppf(0.999, worlds, 0.1)


def test_betting_uses_that_losses_vary_little() -> None:
    losses = np.full(80, 0.1)
    assert mean_upper(losses, 0.05) < 0.5 * clopper_pearson_upper(8, 80, 0.05) + 0.1
    low, high = mean_interval(losses, 0.05)
    assert low < 0.1 < high < 0.2


@pytest.mark.parametrize("losses", [[], [0.5, 1.1], [-0.1], [math.nan]])
def test_what_is_no_loss_is_refused(losses: list[float]) -> None:
    with pytest.raises(ValueError, match="loss"):
        betting_p_value(losses, 0.5)


@pytest.mark.parametrize(("failures", "n"), [(3, 2), (-1, 5), (0, 0)])
def test_counts_that_cannot_be_are_refused(failures: int, n: int) -> None:
    with pytest.raises(ValueError, match="count again"):
        clopper_pearson_upper(failures, n, 0.05)
