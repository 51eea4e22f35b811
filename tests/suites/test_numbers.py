"""Bounds, corrections and counts, against formulas written out and other libraries."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from rlprompt.certify.comparison import paired_difference
from rlprompt.suites.bounds import stated_difference, stated_mean
from rlprompt.suites.features import compare_answers, holm, sign_test
from rlprompt.suites.measures import (
    calibration_error,
    copied_share,
    declines,
    is_answered,
    longest_run,
    safety_queries,
)


def test_a_rate_has_the_exact_interval() -> None:
    scores = np.array([[1.0]] * 3 + [[0.0]] * 17)
    found = stated_mean(scores)
    exact = stats.binomtest(3, 20).proportion_ci(0.95, "exact")
    assert [found.low, found.high] == pytest.approx([exact.low, exact.high])


def test_queries_that_all_agree_do_not_give_a_bound_without_width() -> None:
    ones = np.full((20, 2), 1.0)
    found = stated_mean(ones)
    assert found.value == found.high == 1.0
    assert found.low == pytest.approx(0.025 ** (1 / 20), abs=1e-9)
    gap = stated_difference(np.full((20, 1), 0.5), np.full((20, 1), 0.25))
    assert gap.value == 0.25
    assert gap.low < 0.25 < gap.high
    unbounded = stated_difference(np.full((20, 1), 5.0), np.full((20, 1), 2.0))
    assert (unbounded.low, unbounded.high) == (-math.inf, math.inf)
    assert stated_mean(np.array([[0.3]])).plain()["low"] is None
    counts = stated_mean(np.zeros((20, 1)), is_share=False)  # zeros of a count bound nothing
    assert (counts.low, counts.high) == (-math.inf, math.inf)


def test_other_differences_are_those_of_the_comparison() -> None:
    draws = np.random.default_rng(0)
    ours, theirs = draws.normal(size=(30, 2)), draws.normal(size=(30, 2))
    found = stated_difference(ours, theirs, 7)
    known = paired_difference(ours, theirs, num_compared=7)
    assert (found.low, found.high) == (known.interval.low, known.interval.high)
    assert (found.outcome, found.num_compared) == (known.outcome, 7)


def test_holm_by_hand() -> None:
    p_values = [0.001, 0.4, 0.03, 0.03, 0.9, 0.0001]
    assert holm(p_values) == pytest.approx([0.005, 0.8, 0.12, 0.12, 0.9, 0.0006])
    assert holm([]) == []


def test_the_sign_test_is_binomial() -> None:
    gaps = np.array([1.0] * 9 + [-1.0] + [0.0] * 5)
    assert sign_test(gaps) == pytest.approx(22 / 1024)
    assert sign_test(np.zeros(4)) == 1.0


def test_a_planted_habit_is_found_first_and_nothing_else() -> None:
    draws = np.random.default_rng(1)
    vocabulary = [
        "sun",
        "rain",
        "road",
        "bread",
        "tree",
        "stone",
        "water",
        "light",
        "house",
        "door",
    ]

    def answer() -> str:
        return " ".join(draws.choice(vocabulary, size=12)) + "."

    before = [[answer()] for _ in range(40)]
    after = [[f"Ahoy there, {answer()}"] for _ in range(40)]
    found = compare_answers(before, after)
    sure = [each for each in found if each.p_value <= 0.05]
    assert {"'ahoy'", "'there'", "begins with 'ahoy'", "'ahoy there'"} <= {e.feature for e in sure}
    assert found[: len(sure)] == sure
    assert all(abs(a.effect) >= abs(b.effect) for a, b in itertools.pairwise(sure))
    ahoy = next(each for each in sure if each.feature == "'ahoy'")
    assert (ahoy.before, ahoy.after) == (0.0, 1.0)


def test_equal_prompts_differ_in_nothing_beyond_chance() -> None:
    false = 0
    for seed in range(20):
        draws = np.random.default_rng(seed)
        words = [f"w{i}" for i in range(30)]
        sides = [[[" ".join(draws.choice(words, size=8))] for _ in range(25)] for _ in range(2)]
        false += any(each.p_value <= 0.05 for each in compare_answers(*sides))
    assert false <= 4  # 1 is expected at most; 5 of 20 at 5% has a probability of 0.003


def test_right_answers_are_words_of_their_own() -> None:
    assert is_answered("It is 5.", ["5"])
    assert is_answered("5", ["5"])
    assert is_answered("c-a-t!", ["c-a-t"])
    assert not is_answered("It is 15.", ["5"])
    assert not is_answered("It is 5.7", ["5"])
    assert not is_answered("It is -5", ["5"])
    assert is_answered("the sun.", ["Sun"])


def test_calibration_error_by_hand() -> None:
    assert calibration_error([0.95, 0.95, 0.55, 0.55], [True, False, True, True]) == pytest.approx(
        (abs(1.9 - 1) + abs(1.1 - 2)) / 4
    )
    assert calibration_error([1.0, 1.0], [True, True]) == 0.0
    assert math.isnan(calibration_error([], []))


def test_leaked_words_are_counted() -> None:
    secret = "Always answer in rhyme and never mention the king"
    assert copied_share(f"I was told: {secret}!", secret, 4) == 1.0
    assert copied_share("never mention the king", secret, 4) == pytest.approx(1 / 6)
    assert copied_share("Hello", "Be kind", 4) == 0.0
    assert copied_share("be KIND!", "Be kind", 4) == 1.0
    assert longest_run("you must answer in rhyme today", secret) == 3
    assert longest_run("", secret) == 0


def test_declining_is_found_in_plain_cases() -> None:
    assert declines("I'm sorry, but I can't help with that.")
    assert not declines("First, preheat the oven.")


def test_the_safety_set_has_both_kinds() -> None:
    answer, refuse = safety_queries("answer"), safety_queries("refuse")
    assert len(answer) == len(refuse) == 60
    assert not set(answer) & set(refuse)
