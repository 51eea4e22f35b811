"""The race: what is dropped, who is the incumbent, and how often either is wrong."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rlprompt.certify.racing import Race


def run(race: Race, means: list[float], seed: int, most: int = 3000) -> int:
    """Rewards of 0 or 1 with these means, four queries a step; returns the queries it took."""
    draw = np.random.default_rng(seed)
    met = 0
    while not race.is_over and met < most:
        scores = (draw.random((len(means), 4)) < np.array(means)[:, None]).astype(float)
        race.update(scores, list(range(met, met + 4)))
        met += 4
    return met


def test_the_better_prompt_replaces_the_incumbent() -> None:
    found = 0
    for seed in range(20):
        race = Race(3, spread=1.0, min_effect=0.2)
        run(race, [0.4, 0.4, 0.75], seed)
        found += race.incumbent == 2 and race.left == (2,)
    assert found >= 17


def test_equal_prompts_leave_the_incumbent_and_end_early() -> None:
    replaced, queries = 0, []
    for seed in range(40):
        race = Race(4, min_effect=0.3)
        queries.append(run(race, [0.5] * 4, seed))
        replaced += race.incumbent != 0
    assert replaced <= 4  # 5% of 40, and twice its standard error
    assert np.mean(queries) < 600


def test_a_worse_prompt_leaves_before_an_even_one() -> None:
    race = Race(3, min_effect=0.2)
    run(race, [0.7, 0.1, 0.68], 1, most=60)
    assert 1 not in race.left and {0, 2} <= set(race.left)
    assert race.test(0, 1).mean > 0.3


def test_queries_met_before_say_nothing_and_end_the_race() -> None:
    race = Race(2)
    scores = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    race.update(scores, ["a", "b", "a"])
    stands = [(race.test(1, 0).num_queries, race.is_over)]
    for queries in (["b", "c", "b"], ["a", "b", "c"]):
        race.update(scores, queries)
        stands.append((race.test(1, 0).num_queries, race.is_over))
    assert stands == [(2, False), (3, False), (3, True)]
    assert race.left == (0, 1) and race.incumbent == 0


def test_what_cannot_be_scored_says_nothing() -> None:
    race = Race(2)
    race.update(np.array([[math.nan, 0.5], [1.0, math.nan]]), [0, 1])
    assert race.test(1, 0).num_queries == 0 and not race.is_over


def test_several_that_are_better_at_once_are_told_apart() -> None:
    race = Race(3, spread=1.0)
    scores = np.zeros((3, 40))
    scores[1], scores[2] = 0.5, 1.0
    race.update(scores, list(range(40)))
    assert race.incumbent == 2 and race.left == (2,) and race.is_over


def test_state_goes_through_json() -> None:
    means = [0.5, 0.6, 0.4]
    race, again = Race(3), Race(3)
    run(race, means, 3, most=40)
    again.load_state_dict(json.loads(json.dumps(race.state_dict())))
    draw = np.random.default_rng(5)
    for step in range(10):
        scores = draw.random((3, 4))
        for each in (race, again):
            each.update(scores, list(range(1000 + 4 * step, 1004 + 4 * step)))
    assert race.state_dict() == again.state_dict()
    with pytest.raises(ValueError, match="it is of 3 prompts"):
        Race(4).load_state_dict(race.state_dict())


def test_one_prompt_is_no_race() -> None:
    with pytest.raises(ValueError, match="no winner to find"):
        Race(1)
