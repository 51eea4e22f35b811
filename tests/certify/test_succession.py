"""Which prompt is kept: error rates by simulation, levels by counting, and the checkpoint."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from rlprompt.certify.acceptance import Acceptance, PairedTest
from rlprompt.certify.comparison import Scores
from rlprompt.certify.succession import (
    RESERVE,
    Against,
    Member,
    Succession,
    compete,
    decide,
    fewest_queries,
    member_alpha,
    planned_evaluations,
)

NAN = float("nan")


def levels(acceptance: Acceptance, decisions: list[bool]) -> list[float]:
    found = []
    for is_accepted in decisions:
        test = acceptance.begin()
        found.append(test.level)
        test.decision = "accept" if is_accepted else "reject"
        acceptance.close(test)
    return found


def test_the_levels_of_all_pairs_sum_to_alpha_at_most() -> None:
    """Each pair of a candidate and an earlier prompt is a hypothesis of its own."""
    num, beyond = 5, 3
    by_pair: dict[tuple[int, int], float] = {}
    for decisions in itertools.product([False, True], repeat=num + beyond):
        rule = Acceptance(0.05, num_candidates=num, fixed=True, reserve=RESERVE)
        incumbent = 0
        found = levels(rule, list(decisions))
        for place, (level, won) in enumerate(zip(found, decisions, strict=True), start=1):
            pair = (place, incumbent)
            assert by_pair.setdefault(pair, level) == pytest.approx(level)  # of the pair alone
            incumbent = place if won else incumbent
    assert 0.9 * 0.05 < sum(by_pair.values()) <= 0.05


def test_no_level_is_below_that_of_a_proposer_that_follows_the_tests() -> None:
    for decisions in itertools.product([False, True], repeat=5):
        ours = levels(Acceptance(0.05, num_candidates=5, fixed=True), list(decisions))
        reuse = levels(Acceptance(0.05, num_candidates=5, reuse=True), list(decisions))
        for place, (own, other) in enumerate(zip(ours, reuse, strict=True)):
            # Half the level is kept for the start, whoever is the incumbent.
            assert own >= other or sum(decisions[:place]) == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"reuse": True, "fixed": True}, "set reuse or fixed"),
        ({"num_candidates": 2, "reserve": 1.0}, "reserve is 1"),
        ({"reserve": 0.1}, "announce a number"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(
    settings: dict[str, float | bool], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        Acceptance(**settings)  # type: ignore[arg-type]


def table(draw: np.random.Generator, mean: float, queries: int = 40) -> Scores:
    return mean + draw.normal(0.0, 0.3, (queries, 2))


@pytest.mark.parametrize("against", ["start", "kept"])
@pytest.mark.parametrize(("spread", "gain"), [(None, 0.4), (4.0, 2.0)])
def test_equal_prompts_are_rarely_kept_and_a_better_one_is(
    spread: float | None, gain: float, against: Against
) -> None:
    draw = np.random.default_rng(0)
    wrong, found, runs = 0, 0, 200
    for _ in range(runs):
        start, *others = (table(draw, 0.5) for _ in range(6))
        flat = Succession.announced(5, 0.2, spread, against)
        best = start
        for step, each in enumerate(others, 1):
            best = each if flat.challenge(step, each, best).kept and against == "kept" else best
        wrong += flat.kept > 0
        rising = Succession.announced(5, 0.2, spread, against)
        found += rising.challenge(10, others[0] + gain, start).kept
    assert wrong <= 0.2 * runs
    assert found >= 0.9 * runs


def test_a_candidate_is_held_against_the_one_that_was_kept() -> None:
    draw = np.random.default_rng(1)
    start, middle, last = (table(draw, mean) for mean in (0.0, 2.0, 0.5))
    run = Succession.announced(2, 0.05, None, "kept")
    assert run.challenge(10, middle, start).kept and run.kept == run.opponent == 10
    assert not run.challenge(20, last, middle).accepted and run.kept == 10
    assert [each.against for each in run.challenges] == [0, 10]
    assert run.challenges[1].difference == pytest.approx(-1.5, abs=0.2)
    assert run.weight == pytest.approx((1 - RESERVE) / 2 / 2)


def test_the_highest_of_those_that_are_better_than_the_start_is_kept() -> None:
    draw = np.random.default_rng(1)
    start, *later = (table(draw, mean) for mean in (0.0, 0.5, 2.0, 1.0, 2.5))
    run = Succession.announced(4, 0.05, None)
    found = [run.challenge(step, each, start) for step, each in enumerate(later, 1)]
    assert [each.kept for each in found] == [True, True, False, True] and run.kept == 4
    assert all(each.accepted and each.against == 0 for each in found)
    # What was refuted passes its level on.
    first = 0.05 * (1 - RESERVE) / 4
    assert [each.level for each in found] == pytest.approx([first * k for k in (1, 2, 3, 4)])


def test_a_longer_run_goes_on_at_what_was_put_aside_and_state_is_json() -> None:
    draw = np.random.default_rng(2)
    start = table(draw, 0.0)
    run = Succession.announced(2, 0.05, 4.0)
    for step in range(1, 5):
        run.challenge(step, table(draw, 0.0), start)
        again = Succession.from_state(json.loads(json.dumps(run.state_dict())))
        assert again == run
        run = again
    spent = [each.level for each in run.challenges]
    assert spent == pytest.approx([0.05 * 0.9 / 2, 0.05 * 0.9 / 2, 0.05 * 0.1 / 2, 0.05 * 0.1 / 6])


def test_what_was_not_scored_says_nothing_and_a_wrong_spread_changes_nothing() -> None:
    run = Succession.announced(2, 0.05, 1.0)
    start = np.zeros((30, 2))
    unknown = np.full((30, 2), NAN)
    assert not run.challenge(1, unknown, start).accepted
    assert run.challenges[0].difference is None and run.challenges[0].p_value == 1.0
    before = run.state_dict()
    with pytest.raises(ValueError, match="beyond the spread"):
        run.challenge(2, start + 2.0, start)
    assert run.state_dict() == before


def test_the_sign_test_is_exact() -> None:
    """By counting: P(at least 9 of 10), ties and unknown values left out."""
    ours = np.array([[1.0]] * 9 + [[-1.0]] + [[0.0]] * 4 + [[NAN]])
    found = decide(ours, np.zeros_like(ours), 0.05, None)
    assert found.p_value == pytest.approx((10 + 1) / 2**10) and found.accepted
    assert decide(ours, ours, 0.05, None).p_value == 1.0
    assert not decide(-ours, np.zeros_like(ours), 0.05, None).accepted


@pytest.mark.parametrize("against", ["start", "kept"])
def test_members_share_one_error_rate(against: Against) -> None:
    """Equal prompts, with weights as their runs gave them: the population's alpha holds."""
    draw = np.random.default_rng(3)
    alpha, runs, wrong = 0.3, 150, 0
    for _ in range(runs):
        kept = []
        for name in ("a", "b", "c"):
            own = Succession.announced(3, member_alpha(alpha, 3, against), None, against)
            best = start = table(draw, 0.5)
            for step in (1, 2, 3):
                candidate = table(draw, 0.5)
                rival = start if against == "start" else best
                best = candidate if own.challenge(step, candidate, rival).kept else best
            wrong += best is not start
            kept.append(Member(name, best, own.weight))
        if against == "kept":
            wrong += any(each.accepted for each in compete(kept, alpha, None, 3))
    assert wrong <= alpha * runs


MEANS = {"a": 0.0, "b": 0.0, "c": 3.0}


def test_a_member_that_is_better_is_chosen_and_the_pairs_sum_to_half_of_alpha() -> None:
    draw = np.random.default_rng(4)
    members = [Member(name, table(draw, mean, 60), 0.5) for name, mean in MEANS.items()]
    challenges = compete(members, 0.05, None, 3)
    assert [each.accepted for each in challenges] == [False, True]
    assert [each.against for each in challenges] == ["a", "a"]
    # Starts only: half of each member's weight. All of it: four times as much for each test.
    assert 4 * (challenges[0].level + 2 * challenges[1].level) == pytest.approx(0.025)
    assert compete(members[:1], 0.05, None, 1) == []
    assert member_alpha(0.05, 1, "kept") == 0.05
    assert member_alpha(0.05, 2, "kept") == member_alpha(0.05, 4, "start") == 0.0125


@pytest.mark.parametrize("spread", [None, 1.0])
@pytest.mark.parametrize("level", [0.05, 0.001])
def test_the_fewest_queries_that_can_accept(level: float, spread: float | None) -> None:
    count = fewest_queries(level, spread)
    ours = np.ones((count, 1))
    assert decide(ours, ours * 0.0, level, spread).accepted
    assert not decide(ours[1:], ours[1:] * 0.0, level, spread).accepted


def test_planned_evaluations_count_the_last_step() -> None:
    assert [planned_evaluations(*each) for each in ((30, 10), (31, 10), (5, 10))] == [3, 4, 1]


def test_without_a_miss_rate_nothing_is_hopeless() -> None:
    test = PairedTest(0.05, spread=0.05, miss_rate=None)  # the default min_effect is beyond it
    assert test.update([-0.05] * 500) == "more"
