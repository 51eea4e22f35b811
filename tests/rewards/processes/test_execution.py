from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.rewards import LoadedReward, RewardRunner, RewardSettings
from rlprompt.rewards.processes import execution as execution_module
from rlprompt.types import Completion, Group, Query

GROUP = Group(
    Query(({"role": "user", "content": "one?"},)),
    (Completion((2,), (0.0,), "a", True), Completion((2,), (0.0,), "b", True)),
)


def runner_of(*functions: Any, timeout: float | None = 0.1, on_error: Any = "skip") -> RewardRunner:
    return RewardRunner(
        [
            LoadedReward(
                RewardSettings(path="x:y", name=f"r{i}", timeout=timeout, on_error=on_error), each
            )
            for i, each in enumerate(functions)
        ]
    )


class Async:
    """An object with an async call: TRL awaits these as well."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.loops: set[int] = set()

    async def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        self.loops.add(id(asyncio.get_running_loop()))
        await asyncio.sleep(self.seconds)
        return [1.0] * len(completions)


def test_async_rewards_run_concurrently_beside_sync_ones_in_their_order() -> None:
    async def second(completions: list[Any]) -> list[float]:
        await asyncio.sleep(0.2)
        return [2.0] * len(completions)

    def third(completions: list[Any]) -> list[float]:
        return [4.0] * len(completions)

    start = time.perf_counter()
    batch = runner_of(Async(0.2), second, third, timeout=5.0).score([GROUP], step=0)
    assert time.perf_counter() - start < 0.38
    assert batch.total.tolist() == [7.0, 7.0]
    assert list(batch.values) == ["r0", "r1", "r2"]


def test_one_event_loop_serves_all_batches() -> None:
    reward = Async()
    runner = runner_of(reward)
    for step in range(3):
        runner.score([GROUP], step=step)
    assert len(reward.loops) == 1


def test_runner_works_inside_a_running_event_loop() -> None:
    async def main() -> list[float]:
        totals: list[float] = runner_of(Async()).score([GROUP], step=0).total.tolist()
        return totals

    assert asyncio.run(main()) == [1.0, 1.0]


def test_async_timeout_cancels_only_the_slow_one() -> None:
    batch = runner_of(Async(5.0), Async()).score([GROUP], step=0)
    assert batch.values["r0"].isnan().all()
    assert batch.total.tolist() == [1.0, 1.0]
    (failure,) = batch.errors
    assert failure.kind == "timeout"
    assert "longer than its timeout of 0.1 s for 2 completions" in failure.message


def test_async_exception_names_the_line() -> None:
    async def broken(completions: list[Any]) -> list[float]:
        await asyncio.sleep(0)
        raise ConnectionError("no route")

    with pytest.raises(InputError, match=r"raised ConnectionError: no route at .*test_execution"):
        runner_of(broken, on_error="raise").score([GROUP], step=0)


def test_timeout_error_of_the_reward_itself_is_an_exception() -> None:
    async def own(completions: list[Any]) -> list[float]:
        raise TimeoutError("the server took too long")

    (failure,) = runner_of(own).score([GROUP], step=0).errors
    assert failure.kind == "exception"


def test_coroutine_that_blocks_the_loop_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution_module, "ASYNC_GRACE", 0.1)
    release = threading.Event()

    async def blocking(completions: list[Any]) -> list[float]:
        release.wait(5.0)
        return [0.0] * len(completions)

    try:
        with pytest.raises(InputError, match=r"async reward 'r0' did not stop .* blocks the event"):
            runner_of(blocking).score([GROUP], step=0)
    finally:
        release.set()


def test_sync_timeout_raises_or_skips() -> None:
    release = threading.Event()

    def slow(completions: list[Any]) -> list[float]:
        release.wait(5.0)
        return [0.0] * len(completions)

    try:
        with pytest.raises(InputError, match=r"reward 'r0' took longer than its timeout of 0.1 s"):
            runner_of(slow, on_error="raise").score([GROUP], step=0)
        (failure,) = runner_of(slow).score([GROUP], step=0).errors
        assert failure.kind == "timeout"
    finally:
        release.set()


def test_second_timeout_while_the_first_call_still_runs_stops_the_run() -> None:
    release = threading.Event()

    def stuck(completions: list[Any]) -> list[float]:
        release.wait(5.0)
        return [0.0] * len(completions)

    runner = runner_of(stuck)
    try:
        assert len(runner.score([GROUP], step=0).errors) == 1
        with pytest.raises(InputError, match=r"again while its earlier call still runs"):
            runner.score([GROUP], step=1)
    finally:
        release.set()


def test_second_timeout_after_the_first_call_ended_is_skipped_again() -> None:
    calls: list[threading.Event] = []

    def slow(completions: list[Any]) -> list[float]:
        calls.append(threading.Event())
        calls[-1].wait(5.0)
        return [0.0] * len(completions)

    runner = runner_of(slow)
    for step in range(2):
        assert len(runner.score([GROUP], step=step).errors) == 1
        calls[-1].set()
        time.sleep(0.1)


def test_late_logs_of_a_lost_call_reach_no_batch() -> None:
    release, logged = threading.Event(), threading.Event()

    def slow(completions: list[Any], log_metric: Any) -> list[float]:
        if not release.is_set():
            release.wait(5.0)
            log_metric("late", 1.0)
            logged.set()
        return [0.0] * len(completions)

    runner = runner_of(slow)
    first = runner.score([GROUP], step=0)
    release.set()
    assert logged.wait(5.0)
    assert "late" not in first.metrics
    assert "late" not in runner.score([GROUP], step=1).metrics


def test_sync_rewards_share_one_worker_thread_and_none_means_the_callers() -> None:
    threads: list[int] = []

    def note(completions: list[Any]) -> list[float]:
        threads.append(threading.get_ident())
        return [0.0] * len(completions)

    runner = runner_of(note, note)
    runner.score([GROUP], step=0)
    runner.score([GROUP], step=1)
    assert len(set(threads)) == 1
    assert threading.get_ident() not in threads
    runner_of(note, timeout=None).score([GROUP], step=0)
    assert threads[-1] == threading.get_ident()


def test_close_ends_the_threads_and_the_runner_can_go_on() -> None:
    names = {"rlprompt-rewards", "rlprompt-rewards-async"}
    before = set(threading.enumerate())
    runner = runner_of(Async(), lambda completions: [0.0] * len(completions))
    runner.score([GROUP], step=0)
    mine = [thread for thread in threading.enumerate() if thread not in before]
    assert {thread.name for thread in mine} == names
    runner.close()
    for thread in mine:
        thread.join(5.0)
        assert not thread.is_alive()
    assert runner.score([GROUP], step=1).total.tolist() == [1.0, 1.0]
    runner.close()
