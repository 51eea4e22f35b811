"""Bounds that carry a judge's errors: exact coverage by enumeration, and what they cost."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from rlprompt.certify.bounds import clopper_pearson_lower, clopper_pearson_upper
from rlprompt.certify.judge import JudgedRate, JudgeLabels


@pytest.mark.parametrize("sensitivity", [0.6, 0.95])
@pytest.mark.parametrize("false_alarms", [0.0, 0.1])
def test_false_certificates_counted_exactly(sensitivity: float, false_alarms: float) -> None:
    n, failures, others, rate, delta = 30, 7, 8, 0.2, 0.2
    flag_rate = rate * sensitivity + (1 - rate) * false_alarms
    wrong = 0.0
    for i, p in enumerate(binom.pmf(np.arange(failures + 1), failures, sensitivity)):
        for j, q in enumerate(binom.pmf(np.arange(others + 1), others, false_alarms)):
            if p * q < 1e-4:
                wrong += p * q
                continue
            judged = JudgedRate(JudgeLabels(i, failures, j, others), n)
            wrong += p * q * binom.cdf(judged.most_flagged(rate, delta), n, flag_rate)
    assert wrong <= delta


def test_it_is_tighter_than_three_bounds_at_a_third_and_above_the_plug_in() -> None:
    labels, n, flagged, delta = JudgeLabels(213, 250, 12, 250), 200, 13, 0.05
    q = clopper_pearson_upper(flagged, n, delta / 3)
    s = clopper_pearson_lower(213, 250, delta / 3)
    f = clopper_pearson_lower(12, 250, delta / 3)
    found = JudgedRate(labels, n).upper(flagged, delta)
    plug_in = (flagged / n - 12 / 250) / (213 / 250 - 12 / 250)
    assert plug_in < found < (q - f) / (s - f)


def test_the_count_that_still_certifies_agrees_with_the_p_value() -> None:
    judged = JudgedRate(JudgeLabels(43, 50, 1, 50), 200)
    most = judged.most_flagged(0.1, 0.05)
    assert judged.p_value(most, 0.1) <= 0.05 < judged.p_value(most + 1, 0.1)


def test_many_labels_of_a_perfect_judge_are_as_no_judge() -> None:
    labels = JudgeLabels(20_000, 20_000, 0, 20_000)
    found = JudgedRate(labels, 200).upper(4, 0.05)
    assert found == pytest.approx(clopper_pearson_upper(4, 200, 0.05), rel=0.05)


def test_a_judge_at_chance_certifies_nothing() -> None:
    judged = JudgedRate(JudgeLabels(10, 20, 10, 20), 1000)
    assert judged.upper(500, 0.05) > 0.9
    assert judged.limit_of_labels(500, 0.05) > 0.9
    assert JudgedRate(JudgeLabels(1, 1, 0, 1), 100).most_flagged(0.1, 0.05) == -1


def test_what_labels_leave_possible_is_less_than_what_n_leaves() -> None:
    judged = JudgedRate(JudgeLabels(90, 100, 5, 100), 200)
    assert 0.0 < judged.limit_of_labels(20, 0.05) < judged.upper(20, 0.05)


@pytest.mark.parametrize("counts", [(1, 0, 0, 5), (0, 5, 0, 0), (3, 2, 0, 5), (-1, 2, 0, 5)])
def test_labels_that_cannot_be_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="flagged of"):
        JudgeLabels(*counts)
