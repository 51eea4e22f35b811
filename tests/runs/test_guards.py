from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.runs.guards import (
    Alarm,
    GuardWatch,
    LimitGuard,
    PartingGuard,
    alarms_of,
    require_known_rewards,
    stopped_by,
)

GOLD = "rewards/helpful/mean"


def run(guard: Any, rows: Sequence[dict[str, float]], state: Any = None) -> list[Alarm]:
    state = {} if state is None else state
    watch = GuardWatch([guard])
    for step, row in enumerate(rows, start=1):
        watch.observe(step, row, state)
    return alarms_of(state)


def rows_of(proxy: Sequence[float], gold: Sequence[float]) -> list[dict[str, float]]:
    return [{"reward": p, GOLD: g} for p, g in zip(proxy, gold, strict=True)]


def noise(seed: int, count: int) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(0.0, 1.0) for _ in range(count)]


def parting(**fields: Any) -> PartingGuard:
    return PartingGuard(name="parted", gold="helpful", **fields)


HUMP = [min(t, 40 - t) * 0.2 for t in range(60)]  # gold rises for 20 batches, then falls
LINE = [t * 0.2 for t in range(60)]


def test_an_alarm_is_raised_soon_after_proxy_and_gold_part() -> None:
    steps = []
    for seed in range(20):
        proxy = [a + b for a, b in zip(LINE, noise(2 * seed, 60), strict=True)]
        gold = [a + b for a, b in zip(HUMP, noise(2 * seed + 1, 60), strict=True)]
        steps.append(run(parting(), rows_of(proxy, gold))[0].step)
    assert min(steps) >= 25
    assert sorted(steps)[10] <= 42


def test_no_alarm_when_both_rise_both_fall_or_gold_alone_falls() -> None:
    flat = [0.0] * 60
    falling = [-value for value in LINE]
    for proxy, gold in [(LINE, LINE), (falling, falling), (flat, falling), (LINE, flat)]:
        assert run(parting(), rows_of(proxy, gold)) == []


def test_about_one_run_in_a_hundred_raises_an_alarm_on_noise() -> None:
    runs = [run(parting(), rows_of(noise(2 * s, 100), noise(2 * s + 1, 100))) for s in range(300)]
    assert sum(bool(alarms) for alarms in runs) <= 6


def test_limits_absolute_and_relative() -> None:
    rows = [{"kl": value} for value in [0.1] * 6 + [0.5] * 6]
    above = LimitGuard(name="kl", metric="kl", above=0.3, window=3, patience=2)
    # The mean of three is above 0.3 from the second 0.5 on (step 8), and still one batch later.
    assert [alarm.step for alarm in run(above, rows)] == [9]
    thrice = LimitGuard(name="kl", metric="kl", above=3.0, relative=True, window=3, patience=1)
    (alarm,) = run(thrice, rows)
    assert alarm.step == 8
    assert alarm.reason == "kl is 0.367, above 0.3 (it began at 0.1)"
    below = LimitGuard(name="kl", metric="kl", below=0.2, window=2, patience=1)
    assert [alarm.step for alarm in run(below, rows)] == [2]


def test_an_alarm_is_logged_once_while_the_metric_shows_how_long_it_holds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guard = LimitGuard(name="long", metric="n", above=1.0, window=2, patience=1, action="stop")
    watch = GuardWatch([guard])
    state: dict[str, Any] = {}
    with caplog.at_level(logging.WARNING):
        seen = [watch.observe(i, {"n": v}, state) for i, v in enumerate([0, 3, 3, 0, 0, 5, 5], 1)]
    assert [shown["guards/long"] for shown in seen] == [0, 1, 1, 1, 0, 1, 1]
    assert stopped_by(state) == "long"
    assert [alarm.step for alarm in alarms_of(state)] == [2, 6]
    assert len(caplog.records) == 2
    assert "guard 'long', step 2: n is 1.5, above 1; the run stops" in caplog.text


def test_a_warning_never_stops_the_run() -> None:
    guard = LimitGuard(name="long", metric="n", above=1.0, window=2, patience=1)
    state: dict[str, Any] = {}
    (alarm,) = run(guard, [{"n": 9.0}] * 3, state)
    assert not alarm.stop
    assert stopped_by(state) is None


def test_a_resumed_run_raises_the_alarms_of_an_uninterrupted_one() -> None:
    rows = rows_of(LINE, HUMP)
    whole: dict[str, Any] = {}
    run(parting(), rows, whole)
    first: dict[str, Any] = {}
    run(parting(), rows[:23], first)
    resumed = json.loads(json.dumps(first))
    watch = GuardWatch([parting()])
    for step, row in enumerate(rows[23:], start=24):
        watch.observe(step, row, resumed)
    assert alarms_of(resumed) == alarms_of(whole) != []


def test_only_the_split_that_a_guard_names_is_watched() -> None:
    guard = LimitGuard(name="a", metric="n", above=1.0, window=2, patience=1, split="heldout")
    watch = GuardWatch([guard])
    state: dict[str, Any] = {}
    for step in range(3):
        assert watch.observe(step, {"n": 9.0}, state) == {}
    for step in range(3):
        watch.observe(step, {"n": 9.0}, state, split="heldout")
    assert len(alarms_of(state)) == 1


def test_a_metric_that_is_sometimes_missing_is_passed_over_and_one_that_never_comes_is_wrong() -> (
    None
):
    guard = LimitGuard(name="long", metric="lenght", above=1.0, window=3)
    watch = GuardWatch([guard])
    state: dict[str, Any] = {}
    watch.observe(1, {"length": 1.0}, state)
    watch.observe(2, {"length": 1.0}, state)
    with pytest.raises(InputError, match=r"watches the metric 'lenght'.*did you mean 'length'"):
        watch.observe(3, {"length": 1.0}, state)
    guard = LimitGuard(name="long", metric="n", above=1.0, window=2, patience=1)
    rows: list[dict[str, float]] = [{"n": 5.0}, {}, {}, {}, {"n": 5.0}]
    assert [alarm.step for alarm in run(guard, rows)] == [5]


@pytest.mark.parametrize(
    ("guard", "sentence"),
    [
        (
            parting(proxy="lenght"),
            "proxy names the reward 'lenght', which the recipe",
        ),
        (parting(), "gold names the reward 'helpful'"),
        (PartingGuard(name="g", gold="length"), "'length' with role 'score'; what is trained on"),
    ],
)
def test_guards_name_rewards_of_the_recipe(guard: PartingGuard, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        require_known_rewards([guard], {"length": "score", "careful": "metric"})


def test_good_guards_are_accepted_and_names_are_unique() -> None:
    require_known_rewards([parting(proxy="length")], {"length": "score", "helpful": "metric"})
    with pytest.raises(InputError, match="2 guards are named 'parted'"):
        GuardWatch([parting(), parting()])
    with pytest.raises(ValueError, match="neither above nor below is set"):
        LimitGuard(name="a", metric="n")
