"""Streams: bets never win by luck more often than delta, and alarms come when they should."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from experiments.simulate_certificates import monitored, wealth_table
from rlprompt.certify.bounds import BETS, betting_p_value
from rlprompt.certify.monitor import (
    EProcess,
    Monitor,
    confidence_sequence,
    running_log_wealth,
    start_shares,
)


def test_wealth_is_the_mixture_of_products() -> None:
    losses, limit = np.array([0.0, 1.0, 0.3, 0.0]), 0.25
    products = [np.prod(1 + c * (limit - losses) / (1 - limit)) for c in BETS]
    process = EProcess(limit, "below")
    assert process.update(losses) == pytest.approx(math.log(np.mean(products)))
    running = running_log_wealth(losses, limit, "below")
    assert running[-1] == pytest.approx(process.log_wealth)
    assert betting_p_value(losses, limit) == pytest.approx(min(1, math.exp(-running.max())))


def test_pieces_and_state_make_no_difference() -> None:
    losses = (np.random.default_rng(0).random(77) < 0.3).astype(float)
    whole = EProcess(0.2, "above", restarts=True)
    whole.update(losses)
    parts = EProcess(0.2, "above", restarts=True)
    for piece in np.array_split(losses, 9):
        parts.update(piece)
        parts = EProcess.from_state(json.loads(json.dumps(parts.state_dict())))
    assert parts.log_wealth == pytest.approx(whole.log_wealth)
    assert len(whole.log_bets) == 8  # from 0, 1, 2, 4, ..., 64 on


def test_the_simulated_monitor_is_the_monitor() -> None:
    losses = (np.random.default_rng(1).random((3, 50)) < 0.3).astype(np.int64)
    found = monitored(np.cumsum(losses, axis=1), wealth_table(50, 0.2, "above"))
    for row, stream in zip(found, losses, strict=True):
        process = EProcess(0.2, "above", restarts=True)
        for time, loss in enumerate(stream):
            assert process.update([float(loss)]) == pytest.approx(row[time], abs=1e-9)


def test_false_alarms_are_as_rare_as_stated_and_true_ones_come() -> None:
    rng = np.random.default_rng(2)
    table = wealth_table(400, 0.1, "above")
    bar = math.log(1 / 0.1)
    calm = np.cumsum(rng.random((1500, 400)) < 0.1, axis=1)
    assert (monitored(calm, table) >= bar).any(axis=1).mean() <= 0.1 + 3 * math.sqrt(0.09 / 1500)
    rate = np.where(np.arange(400) < 200, 0.05, 0.3)
    changed = np.cumsum(rng.random((300, 400)) < rate, axis=1)
    assert (monitored(changed, table) >= bar).any(axis=1).mean() > 0.95


def test_an_alarm_stays_and_survives_a_restart() -> None:
    monitor = Monitor(limit=0.05, delta=0.05)
    while not monitor.observe(1.0):
        pass
    at = monitor.alarmed_at
    assert at is not None and at < 5
    again = Monitor.from_state(json.loads(json.dumps(monitor.state_dict())))
    assert all(again.observe(0.0) for _ in range(200))
    assert again.alarmed_at == at


def test_a_confidence_sequence_holds_at_all_times() -> None:
    rng = np.random.default_rng(4)
    missed = 0
    for _ in range(40):
        low, high = confidence_sequence((rng.random(120) < 0.3).astype(float), 0.1)
        missed += bool((low > 0.3).any() or (high < 0.3).any())
        assert (np.diff(low) >= 0).all() and (np.diff(high) <= 0).all()
    assert missed <= 9  # 99% of draws with a rate of 0.1
    assert high[-1] - low[-1] < 0.4


def test_shares_of_starts_sum_up_to_one() -> None:
    assert start_shares(3).tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 12])
    assert start_shares(10_000).sum() == pytest.approx(1.0, abs=2e-4)


@pytest.mark.parametrize("limit", [0.0, 1.0, -1.0, math.nan])
def test_a_limit_that_nothing_can_be_bet_on_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        EProcess(limit, "above")
    with pytest.raises(ValueError, match="delta"):
        Monitor(0.5, 1.0)
