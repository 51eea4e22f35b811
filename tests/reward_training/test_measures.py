"""Shares, calibration and their fits, against closed forms and simulations with a known answer."""

from __future__ import annotations

import math
import random

import pytest

from rlprompt.reward_training.evaluation import area_under_curve
from rlprompt.reward_training.measures import (
    brier,
    exact_mcnemar,
    expected_calibration_error,
    fit_logistic,
    fit_temperature,
    reliability,
    share,
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_wilson_intervals_of_known_cases() -> None:
    # Values of statsmodels' proportion_confint(method="wilson").
    for count, of, low, high in [(8, 10, 0.49016, 0.94331), (0, 20, 0.0, 0.16113)]:
        found = share([True] * count + [False] * (of - count))
        assert (found.count, found.of) == (count, of)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    nothing = share([])
    assert (nothing.low, nothing.high) == (0.0, 1.0)
    assert math.isnan(nothing.value)


def test_wilson_intervals_cover_the_truth_as_often_as_they_say() -> None:
    draw = random.Random(0)
    for truth in (0.1, 0.5, 0.93):
        covered = 0
        for _ in range(2000):
            found = share([draw.random() < truth for _ in range(60)])
            covered += found.low <= truth <= found.high
        assert 0.93 <= covered / 2000 <= 0.975


def test_a_calibrated_forecast_has_no_error_and_an_overconfident_one_does() -> None:
    draw = random.Random(1)
    chances = [draw.random() for _ in range(40_000)]
    outcomes = [draw.random() < chance for chance in chances]
    assert expected_calibration_error(reliability(chances, outcomes)) < 0.01
    assert brier(chances, outcomes) == pytest.approx(1 / 6, abs=0.005)
    sharp = [sigmoid(3 * math.log(c / (1 - c))) for c in chances]
    assert expected_calibration_error(reliability(sharp, outcomes)) > 0.1
    assert brier(sharp, outcomes) > brier(chances, outcomes)


def test_bins_hold_every_prediction_once_and_take_both_ends() -> None:
    bins = reliability([0.0, 0.05, 0.5, 0.999, 1.0], [False, True, True, True, True])
    assert [each.observed.of for each in bins] == [2, 1, 2]
    assert [each.observed.count for each in bins] == [1, 1, 2]


def test_platt_scaling_finds_the_parameters_that_made_the_data() -> None:
    draw = random.Random(2)
    values = [draw.uniform(-4, 8) for _ in range(20_000)]
    outcomes = [draw.random() < sigmoid((v - 1.5) / 0.8) for v in values]
    offset, temperature = fit_logistic(values, outcomes)
    assert offset == pytest.approx(1.5, abs=0.05)
    assert temperature == pytest.approx(0.8, abs=0.05)


def test_fits_stay_finite_when_separable_and_say_so_when_useless() -> None:
    offset, temperature = fit_logistic([-2.0, -1.0, 1.0, 2.0], [False, False, True, True])
    assert offset == pytest.approx(0.0, abs=0.01)
    assert 0.05 < temperature < 2.0
    assert math.isinf(fit_logistic([1.0, 2.0, 3.0, 4.0], [True, True, False, False])[1])
    assert math.isinf(fit_temperature([-1.0, -2.0]))
    assert 0.1 < fit_temperature([1.0, 2.0, 0.5]) < 1.5


def test_pair_temperature_finds_the_one_that_made_the_data() -> None:
    draw = random.Random(3)
    margins = []
    for _ in range(20_000):
        gap = abs(draw.gauss(0, 3))
        margins.append(gap if draw.random() < sigmoid(gap / 2.5) else -gap)
    assert fit_temperature(margins) == pytest.approx(2.5, rel=0.05)


def test_mcnemar_is_the_binomial_tail() -> None:
    first = [True] * 8 + [False] * 2 + [True] * 5
    second = [False] * 8 + [True] * 2 + [True] * 5
    only_first, only_second, p = exact_mcnemar(first, second)
    assert (only_first, only_second) == (8, 2)
    assert p == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert exact_mcnemar(first, first) == (0, 0, 1.0)


def test_area_under_curve_counts_ties_as_half() -> None:
    assert area_under_curve([0.1, 0.4, 0.4, 0.9], [False, False, True, True]) == 0.875
    assert area_under_curve([3.0, 2.0, 1.0], [False, True, True]) == 0.0
    assert math.isnan(area_under_curve([1.0], [True]))
