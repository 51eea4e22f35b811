"""The acceptance test: against an exact computation, by simulation, and through a checkpoint."""

from __future__ import annotations

import itertools
import json
import math
import pickle

import numpy as np
import pytest

from rlprompt.certify.acceptance import Acceptance, PairedTest

NAN = float("nan")


def accepted(test: PairedTest, draw: np.random.Generator, mean: float, most: int) -> bool:
    """Peek after every query, for differences of -1 or 1 with a mean."""
    while test.decision == "more" and test.num_queries < most:
        test.update([1.0 if draw.random() < (1 + mean) / 2 else -1.0])
    return test.decision == "accept"


def test_the_probability_of_ever_accepting_is_exact_for_fair_coins() -> None:
    """All 2^12 sequences, looked at after each: at most the level, and not by a wide margin."""
    level, wrong = 0.2, 0
    for signs in itertools.product((-1.0, 1.0), repeat=12):
        wrong += PairedTest(level).update(signs) == "accept"
    assert 0.02 < wrong / 2**12 <= level


def test_wealth_is_fair_and_the_p_value_its_inverse() -> None:
    """The mean of the final wealth over all fair sequences is 1."""
    wealth = []
    for values in itertools.product((-1.0, 0.0, 1.0), repeat=6):
        test = PairedTest(1e-12, miss_rate=1e-12)
        assert test.update(values) == "more"
        wealth.append(math.exp(test.log_evidence))
        assert test.p_value == pytest.approx(min(1.0, 1 / wealth[-1]))
        assert test.mean == pytest.approx(sum(values) / 6)
    assert np.mean(wealth) == pytest.approx(1.0)


@pytest.mark.parametrize("mean", [0.0, -0.1])
def test_equal_or_worse_is_rarely_accepted_however_often_one_looks(mean: float) -> None:
    draw = np.random.default_rng(1)
    runs = 300
    wrong = sum(accepted(PairedTest(0.1), draw, mean, 400) for _ in range(runs))
    assert wrong <= 0.1 * runs + 2 * math.sqrt(runs * 0.09)


def test_better_is_found_and_the_hopeless_stops_early() -> None:
    draw = np.random.default_rng(2)
    good = [PairedTest(0.05, min_effect=0.3) for _ in range(100)]
    assert sum(accepted(test, draw, 0.3, 3000) for test in good) >= 85
    bad = [PairedTest(0.05, min_effect=0.3) for _ in range(100)]
    assert sum(accepted(test, draw, 0.0, 3000) for test in bad) <= 5
    assert np.mean([test.num_queries for test in bad]) < np.mean([t.num_queries for t in good])
    assert all(test.decision == "reject" for test in bad if test.decision != "accept")


def test_a_batch_is_the_same_as_one_by_one_and_a_decision_is_final() -> None:
    draw = np.random.default_rng(3)
    values = draw.uniform(-0.2, 1.0, 60)
    whole, single = PairedTest(0.05), PairedTest(0.05)
    whole.update(values)
    for value in values:
        single.update([value])
    assert whole.decision == single.decision == "accept"
    assert whole.num_queries == single.num_queries < 60
    assert whole.log_for == pytest.approx(single.log_for)
    kept = whole.state_dict()
    assert whole.update([-1.0] * 50) == "accept"
    assert whole.state_dict() == kept


def test_what_cannot_be_scored_or_was_met_before_says_nothing() -> None:
    test = PairedTest(0.05)
    test.update([0.5, NAN, 0.5, -0.5, 0.1], ["a", "b", "a", "c", "c"])
    assert test.num_queries == 2 and test.met == ["a", "c"] and test.total == 0.0
    test.update([1.0, 0.25], ["c", "b"])
    assert test.num_queries == 3 and test.mean == pytest.approx(0.25 / 3)
    assert PairedTest(0.05).update([NAN, NAN]) == "more"
    assert math.isnan(PairedTest(0.05).mean) and PairedTest(0.05).p_value == 1.0
    assert PairedTest(0.05).update([]) == "more"


def test_the_spread_is_a_promise_that_is_checked() -> None:
    with pytest.raises(ValueError, match=r"a difference is 1\.5, beyond the spread of 1"):
        PairedTest(0.05).update([0.2, 1.5])
    assert PairedTest(0.05).update([1.0 + 1e-7]) == "more"
    wide, narrow = PairedTest(0.05, spread=20.0, min_effect=2.0), PairedTest(0.05)
    wide.update([20.0, -4.0])
    narrow.update([1.0, -0.2])
    assert wide.log_for == pytest.approx(narrow.log_for)
    signs = PairedTest(0.05, spread=None)
    signs.update([1e9, -1e-9, 0.0])
    plain = PairedTest(0.05)
    plain.update([1.0, -1.0, 0.0])
    assert signs.log_for == pytest.approx(plain.log_for)
    assert signs.mean == pytest.approx((1e9 - 1e-9) / 3)


def test_too_many_queries_without_a_decision_reject() -> None:
    test = PairedTest(0.05, max_queries=5)
    assert test.update([0.0] * 4) == "more"
    assert test.update([0.0] * 4) == "reject"
    assert test.num_queries == 5


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"level": 0.0}, "choose both between 0 and 1"),
        ({"level": 1.0}, "choose both between 0 and 1"),
        ({"level": 0.05, "miss_rate": 1.0}, "choose both between 0 and 1"),
        ({"level": 0.05, "spread": 0.0}, "spread is 0"),
        ({"level": 0.05, "spread": math.inf}, "spread is inf"),
        ({"level": 0.05, "min_effect": 1.0}, "min_effect is 1; choose it between 0 and the spread"),
        ({"level": 0.05, "spread": None, "min_effect": 2.0}, "the spread, 1"),
        ({"level": 0.05, "min_effect": NAN}, "min_effect is nan"),
    ],
)
def test_what_no_test_can_be_made_of_is_refused(
    settings: dict[str, float | None], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        PairedTest(**settings)  # type: ignore[arg-type]


def test_names_and_differences_go_together() -> None:
    with pytest.raises(ValueError, match="2 differences and 1 queries"):
        PairedTest(0.05).update([0.1, 0.2], ["a"])


def test_state_goes_through_json_and_pickle_and_is_a_copy() -> None:
    draw = np.random.default_rng(4)
    test = PairedTest(0.05, min_effect=0.05)
    test.update(draw.uniform(-1, 1, 9), list(range(9)))
    state = json.loads(json.dumps(test.state_dict()))
    again, pickled = PairedTest.from_state(state), pickle.loads(pickle.dumps(test))
    more = draw.uniform(-1, 1, 30)
    for each in (again, pickled, test):
        each.update(more, list(range(5, 35)))
    assert again == test == pickled
    assert state["num_queries"] == 9 and len(state["met"]) == 9
    acceptance = Acceptance(num_candidates=3)
    acceptance.begin()
    assert Acceptance.from_state(json.loads(json.dumps(acceptance.state_dict()))) == acceptance


def spent(rule: Acceptance, decisions: list[bool]) -> list[float]:
    """The levels that a run hands out."""
    levels = []
    for is_accepted in decisions:
        test = rule.begin()
        levels.append(test.level)
        test.decision = "accept" if is_accepted else "reject"
        assert rule.close(test) == is_accepted
    return levels


def test_levels_of_candidates_that_fail_sum_to_alpha() -> None:
    unknown = spent(Acceptance(0.05), [False] * 2000)
    assert 0.0499 < sum(unknown) < 0.05
    known = spent(Acceptance(0.05, num_candidates=7), [False] * 7)
    assert known == pytest.approx([0.05 / 7] * 7)


def test_the_level_of_an_accepted_candidate_passes_on() -> None:
    plain = spent(Acceptance(0.06), [False] * 4)
    passed = spent(Acceptance(0.06), [False, True, True, False])
    assert passed[:2] == plain[:2]
    assert passed[2] == pytest.approx(plain[2] + plain[1])
    assert passed[3] == pytest.approx(plain[3] + plain[2] + plain[1])
    # What true rejections and the first false acceptance can use up is alpha at most.
    for decisions in itertools.product([False, True], repeat=6):
        levels = spent(Acceptance(0.06), [*decisions, False])
        failed = [level for level, good in zip(levels, decisions, strict=False) if not good]
        assert sum(failed) + levels[-1] <= 0.06 + 1e-12


def test_reused_queries_pay_for_all_histories() -> None:
    """Over all candidates that the accept bits can lead to, the levels sum to alpha at most."""
    total = 0.0
    for count in range(11):
        for decisions in itertools.product([False, True], repeat=count):
            total += spent(Acceptance(0.05, reuse=True), [*decisions, False])[-1]
    assert 0.03 < total <= 0.05
    assert spent(Acceptance(0.05, reuse=True), [False] * 3) == pytest.approx(
        [0.05 / 2 / 2, 0.05 / 6 / 2, 0.05 / 12 / 2]
    )


def test_more_candidates_than_announced_are_refused() -> None:
    acceptance = Acceptance(num_candidates=1)
    acceptance.begin()
    with pytest.raises(ValueError, match="1 candidates were announced"):
        acceptance.begin()
    with pytest.raises(ValueError, match="alpha is 0"):
        Acceptance(alpha=0.0)
    with pytest.raises(ValueError, match="num_candidates is 0"):
        Acceptance(num_candidates=0)


def test_a_test_that_was_given_up_is_no_acceptance() -> None:
    acceptance = Acceptance()
    assert not acceptance.close(acceptance.begin())
    assert acceptance.num_accepted == 0 and acceptance.passed_on == 0.0
