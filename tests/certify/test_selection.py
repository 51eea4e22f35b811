"""Learn-then-test: against the definitions, and the best of fifty."""

from __future__ import annotations

import numpy as np
import pytest

from rlprompt.certify.bounds import binomial_p_value
from rlprompt.certify.feasibility import wrong_best_of
from rlprompt.certify.selection import METHODS, Method, joint_p_values, passing


def test_holm_steps_down_and_bonferroni_does_not() -> None:
    p = [0.02, 0.001, 0.04, 0.012]
    assert passing(p, 0.05, method="bonferroni").tolist() == [False, True, False, True]
    assert passing(p, 0.05, method="holm").tolist() == [True, True, True, True]
    assert passing([0.03, 0.001, 0.03, 0.2], 0.05).tolist() == [False, True, False, False]


def test_a_sequence_ends_at_the_first_failure() -> None:
    p = [0.04, 0.05, 0.06, 0.0]
    assert passing(p, 0.05, method="fixed_sequence").tolist() == [True, True, False, False]


def test_candidates_that_are_not_claimed_count_too() -> None:
    assert passing([0.002], 0.05, num_compared=10).tolist() == [True]
    assert passing([0.002], 0.05, num_compared=50).tolist() == [False]
    with pytest.raises(ValueError, match="count again"):
        passing([0.1, 0.2], 0.05, num_compared=1)
    with pytest.raises(ValueError, match="use holm"):
        passing([0.1], 0.05, method="fixed_sequence", num_compared=2)


def test_all_risks_together_cost_nothing() -> None:
    assert joint_p_values([[0.01, 0.2], [0.03, 0.02]]).tolist() == [0.2, 0.03]


@pytest.mark.parametrize("method", METHODS)
def test_the_best_of_fifty_is_not_certified_more_often_than_delta(method: Method) -> None:
    """A plain bound on the best lies with probability 0.70 here (`wrong_best_of`)."""
    rng = np.random.default_rng(1)
    p = np.asarray(binomial_p_value(rng.binomial(100, 0.1, size=(2000, 50)), 100, 0.1))
    wrong = np.mean([passing(row, 0.05, method=method).any() for row in p])
    assert wrong <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)
    assert np.mean((p <= 0.05).any(axis=1)) == pytest.approx(
        wrong_best_of(50, 100, 0.1, 0.05), abs=0.04
    )
    assert wrong_best_of(50, 100, 0.1, 0.05) == pytest.approx(0.70, abs=0.01)
