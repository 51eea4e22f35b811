"""Means and differences by query, against other libraries, closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rlprompt.certify.comparison import (
    mean_interval,
    paired_difference,
    query_means,
    sign_flip_test,
    standard_error,
)


def test_the_mean_and_its_error_are_those_of_query_means() -> None:
    scores = np.array([[0.0, 1.0], [0.5, np.nan], [np.nan, np.nan], [1.0, 1.0]])
    assert query_means(scores)[:2].tolist() == [0.5, 0.5] and math.isnan(query_means(scores)[2])
    means = [0.5, 0.5, 1.0]
    assert standard_error(scores) == pytest.approx(stats.sem(means))
    interval = mean_interval(scores)
    low, high = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
    assert (interval.value, interval.low, interval.high) == pytest.approx((2 / 3, low, high))
    assert interval.num_queries == 3


def test_copies_of_a_completion_do_not_make_an_error_smaller() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(30, 1))
    copied = np.repeat(scores, 8, axis=1)
    assert standard_error(copied) == pytest.approx(standard_error(scores))
    assert mean_interval(copied) == mean_interval(scores)


def test_a_difference_is_the_paired_t_interval() -> None:
    rng = np.random.default_rng(1)
    theirs = rng.normal(size=(25, 2))
    ours = theirs + 0.4 + rng.normal(scale=0.3, size=(25, 2))
    found = paired_difference(ours, theirs)
    expected = stats.ttest_rel(ours.mean(axis=1), theirs.mean(axis=1)).confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(expected))
    assert found.outcome == "better" and paired_difference(theirs, ours).outcome == "worse"
    more = paired_difference(ours, rng.permutation(theirs, axis=1)[:, :1])
    assert more.interval.value == pytest.approx((ours.mean(1) - 0).mean() - theirs.mean(), abs=0.5)


def test_draws_are_paired_where_both_are_known() -> None:
    ours = np.array([[1.0, np.nan], [1.0, 2.0]])
    theirs = np.array([[0.0, 5.0], [1.0, 1.0]])
    assert paired_difference(ours, theirs).interval.value == pytest.approx((1.0 + 0.5) / 2)


@pytest.mark.parametrize("count", [3, 5])
def test_few_queries_prove_nothing_however_alike_they_are(count: int) -> None:
    """The t interval of equal differences has no width; the sign-flip test does not believe it."""
    gain = np.full((count, 2), 0.1)
    found = paired_difference(gain, np.zeros((count, 2)))
    assert found.interval.low == pytest.approx(found.interval.high)
    assert found.p_value == pytest.approx(2 / 2**count) and found.outcome == "unclear"
    many = paired_difference(np.full((12, 1), 0.1), np.zeros((12, 1)))
    assert many.outcome == "better"


def test_equal_values_are_the_same_and_unknown_ones_say_nothing() -> None:
    scores = np.random.default_rng(2).normal(size=(10, 2))
    assert paired_difference(scores, scores).outcome == "same"
    unknown = paired_difference(np.full((10, 2), np.nan), scores)
    assert unknown.outcome == "unclear" and unknown.interval.num_queries == 0
    single = paired_difference(scores[:1], scores[:1] - 1.0)
    assert single.outcome == "unclear" and math.isinf(single.interval.low)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference(scores, scores[:3])


def test_the_sign_flip_test_is_exact_for_few_queries() -> None:
    """Against all sign patterns, tried one by one."""
    values = np.array([0.3, -0.1, 0.5, 0.2, 0.4, -0.05, 0.6])
    signs = np.array(np.meshgrid(*[[-1, 1]] * len(values))).reshape(len(values), -1)
    means = (signs * values[:, None]).mean(axis=0)
    two_sided = (np.abs(means) >= abs(values.mean()) - 1e-12).mean()
    assert sign_flip_test(values) == pytest.approx(two_sided)


def test_no_difference_is_rarely_called_one() -> None:
    """400 worlds of equal prompts: at most 5% plus three binomial errors; corrected ones, fewer."""
    rng = np.random.default_rng(3)
    worlds = 400
    wrong = {1: 0, 10: 0}
    for _ in range(worlds):
        query = rng.normal(size=(12, 1))  # completions of a query are alike
        ours, theirs = (query + rng.normal(size=(12, 2)) for _ in range(2))
        for count in wrong:
            wrong[count] += paired_difference(ours, theirs, num_compared=count).outcome != "unclear"
    assert wrong[1] / worlds <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / worlds)
    assert wrong[10] / worlds <= 0.005 + 3 * math.sqrt(0.005 * 0.995 / worlds)


def test_the_best_of_many_equal_prompts_is_not_called_better() -> None:
    """Chosen from 10 equal ones on the same queries: uncorrected a lie, corrected at most 5%."""
    rng = np.random.default_rng(4)
    worlds, naive, corrected = 150, 0, 0
    for _ in range(worlds):
        start = rng.normal(size=(12, 2))
        prompts = [rng.normal(size=(12, 2)) for _ in range(10)]
        best = max(prompts, key=lambda scores: float(scores.mean()))
        naive += paired_difference(best, start).outcome == "better"
        corrected += paired_difference(best, start, num_compared=10).outcome == "better"
    assert naive / worlds > 0.1
    assert corrected / worlds <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / worlds)
