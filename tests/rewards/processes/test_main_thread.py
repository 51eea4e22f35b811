"""Rewards that need a main thread get one, whatever they make of their own exceptions."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.rewards import LoadedReward, RewardRunner, RewardSettings, build_rewards
from rlprompt.rewards.check.checks import Trial, check_reward
from rlprompt.types import Completion, Group, Query

REWARDS = """
import asyncio, os, signal, threading
from signal import SIGALRM, alarm, setitimer
from signal import signal as install


def limited(work):
    def expired(number, frame):
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(5)
    try:
        return work()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def plain(completions, **kwargs):
    return [limited(lambda text=text: float(text)) for text in completions]


def caught(completions, log_metric=None, **kwargs):
    values = []
    for text in completions:
        try:
            values.append(limited(lambda text=text: float(text)))
        except Exception:
            values.append(0.0)
    if log_metric:
        log_metric("calls", 1.0)
    return values


def caught_by_name(completions, **kwargs):
    try:
        install(SIGALRM, lambda *_: None)
        setitimer(signal.ITIMER_REAL, 5.0)
        setitimer(signal.ITIMER_REAL, 0.0)
    except BaseException:
        return [0.0] * len(completions)
    return [float(text) for text in completions]


def alarm_alone(completions, **kwargs):
    try:
        alarm(5)
        alarm(0)
    except ValueError:
        return [None] * len(completions)
    return [float(text) for text in completions]


class Checker:
    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, completions, **kwargs):
        return [self.scale * value for value in caught(completions)]


async def awaited(completions, **kwargs):
    await asyncio.sleep(0)
    return caught(completions)


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return caught([solution_str])[0]


async def one(text):
    await asyncio.sleep(0)
    return float(text)


def by_loop(completions, **kwargs):
    loop = asyncio.get_event_loop()
    return [loop.run_until_complete(one(text)) for text in completions]


def by_closed_loop(completions, **kwargs):
    loop = asyncio.get_event_loop()
    try:
        return [loop.run_until_complete(one(text)) for text in completions]
    finally:
        loop.close()


def by_run(completions, trainer_state, **kwargs):
    if trainer_state.global_step == 1:
        return [asyncio.run(one(text)) for text in completions]
    return by_loop(completions)


def where(completions, **kwargs):
    return [float(os.getpid())] * len(completions)
"""

ALARMS = ("plain", "caught", "caught_by_name", "alarm_alone", "Checker", "awaited")
LOOPS = ("by_loop", "by_closed_loop", "by_run")
TIMEOUTS = pytest.mark.parametrize("timeout", [30.0, None], ids=["timed", "untimed"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("main_thread")
    (folder / "alarms.py").write_text(REWARDS)
    return folder


def group(*texts: str, **columns: Any) -> Group:
    query = Query(({"role": "user", "content": "one?"},), columns, 0, conversational=False)
    return Group(query, tuple(Completion((2,), (0.0,), text, True) for text in texts))


def build(folder: Path, name: str, **settings: Any) -> RewardRunner:
    given = {"path": f"alarms.py:{name}", "name": "r", "timeout": 30.0} | settings
    return build_rewards([RewardSettings.model_validate(given)], folder)


def twice(runner: RewardRunner) -> None:
    try:
        for batch in (1, 2):
            scored = runner.score([group("1", "2.5")], step=batch)
            assert scored.total.tolist() == [1.0, 2.5]
            assert scored.metrics.get("calls", 1.0) == 1.0
    finally:
        runner.close()


def in_another_thread(work: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("name", ALARMS)
def test_alarms_work_and_one_line_says_where(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    twice(build(folder, name))
    lines = [each.message for each in caplog.records if "main thread" in each.message]
    assert len(lines) == 1
    assert lines[0].startswith("reward 'r' calls signal.")
    assert "a process of its own" in lines[0]


def test_an_adapted_reward_gets_a_main_thread_too(folder: Path) -> None:
    runner = build(folder, "compute_score", adapter="verl")
    try:
        scored = runner.score([group("1", "2", ground_truth="x", data_source="y")], step=0)
        assert scored.total.tolist() == [1.0, 2.0]
    finally:
        runner.close()


def test_options_and_gates_hold_after_the_move(folder: Path) -> None:
    runner = build(folder, "Checker", options={"scale": 2.0})
    try:
        assert runner.score([group("1", "3")], step=0).total.tolist() == [2.0, 6.0]
    finally:
        runner.close()


@TIMEOUTS
@pytest.mark.parametrize("name", ["caught", "by_loop"])
def test_a_run_that_scores_in_another_thread_makes_no_difference(
    folder: Path, name: str, timeout: float | None
) -> None:
    in_another_thread(lambda: twice(build(folder, name, timeout=timeout)))


@TIMEOUTS
@pytest.mark.parametrize("name", LOOPS)
def test_an_event_loop_is_there_as_in_a_main_thread(
    folder: Path, name: str, timeout: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    twice(build(folder, name, timeout=timeout))
    assert "main thread" not in caplog.text


def test_an_isolated_reward_has_both(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("caught", "by_loop", "by_closed_loop"):
        twice(build(folder, name, isolation={"memory_gb": 1.0}))
    assert "main thread" not in caplog.text


def test_in_the_main_thread_nothing_moves(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    twice(build(folder, "caught", timeout=None))
    assert "main thread" not in caplog.text


def test_other_rewards_stay_where_they_are(folder: Path) -> None:
    settings = [
        RewardSettings.model_validate({"path": f"alarms.py:{name}", "name": name})
        for name in ("where", "caught")
    ]
    runner = build_rewards(settings, folder)
    try:
        first = runner.score([group("1")], step=0).values["where"].item()
        second = runner.score([group("1")], step=1).values["where"].item()
    finally:
        runner.close()
    assert first == second


def caught(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that is no file: it cannot be loaded anywhere else."""
    try:
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))
    except ValueError:
        return [0.0] * len(completions)
    return [float(text) for text in completions]


def test_an_object_in_memory_runs_in_the_main_thread(caplog: pytest.LogCaptureFixture) -> None:
    settings = RewardSettings(path="memory:caught", name="r")
    twice(build_rewards([settings], Path(), given={"memory:caught": caught}))
    assert "its timeout of 60 s is not held" in caplog.text


def test_an_object_in_memory_that_has_no_main_thread_is_refused() -> None:
    runner = RewardRunner([LoadedReward(RewardSettings(path="x:y", name="r"), caught)])
    with pytest.raises(InputError, match=r"^reward 'r' calls signal.signal, which needs a main"):
        in_another_thread(lambda: twice(runner))


def test_reward_check_meets_the_same_values(folder: Path) -> None:
    settings = RewardSettings(path="alarms.py:where", name="r")
    rows = check_reward(Trial(settings, folder, {}))
    assert rows
    (folder / "examples.py").write_text(
        REWARDS + "\nfrom rlprompt.rewards import Example\n"
        "EXAMPLES = [Example('q', '0.25', good=False), Example('q', '0.75', good=True)]\n"
        "def reward(completions, **kwargs):\n"
        "    texts = [c if isinstance(c, str) else c[0]['content'] for c in completions]\n"
        "    return caught(texts)\n"
    )
    trial = Trial(RewardSettings(path="examples.py:reward", name="r"), folder, {})
    outcomes = {row.name: row.outcome for row in check_reward(trial)}
    assert outcomes["good examples beat bad ones"] == "passed"


def test_signals_of_the_rest_of_the_program_are_left_alone() -> None:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
        with pytest.raises(ValueError, match="main thread"):
            in_another_thread(lambda: print(signal.signal(signal.SIGUSR2, before)))
    finally:
        signal.signal(signal.SIGUSR2, before)
