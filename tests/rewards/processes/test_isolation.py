"""Rewards in worker processes: real processes that hang, crash, overeat and talk nonsense."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.rewards import RewardBatch, RewardRunner, RewardSettings, build_rewards
from rlprompt.types import Completion, Group, Query

REWARD = """
import asyncio, ctypes, os, re, signal, subprocess, sys, time

CALLS = []


def reward(completions, task=None, log_extra=None, log_metric=None, factor=1.0, **kwargs):
    print("a line that the reward prints")
    CALLS.append(1)
    what = task[0] if task else "length"
    if what == "length":
        if log_extra:
            log_extra("words", [len(text.split()) for text in completions])
            log_metric("calls", len(CALLS))
        return [factor * len(text) for text in completions]
    if what == "pid":
        return [os.getpid()] * len(completions)
    if what == "hang":
        time.sleep(60)
    if what == "hold the lock":
        re.match(r"(a+)+$", "a" * 40 + "b")
    if what == "raise":
        return [int(text) for text in completions]
    if what == "exit":
        sys.exit(3)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "segfault":
        ctypes.string_at(0)
    if what == "memory":
        return [len(bytearray(3 << 30))] * len(completions)
    if what == "child":
        child = subprocess.Popen(["sleep", "60"])
        open(kwargs["note"][0], "w").write(str(child.pid))
        time.sleep(60)
    return {"NaN": [float("nan")] * len(completions), "short": [1.0], "none": None,
            "object": [object()] * len(completions), "set": {1.0}}[what]


async def awaited(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


class Picky:
    def __init__(self, size):
        from rlprompt.errors import InputError
        if size < 0:
            raise InputError(f"size {size} is negative; write a positive one")
        self.size = size

    def __call__(self, completions, label):
        return [self.size if text == want else None for text, want in zip(completions, label)]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("isolated")
    (folder / "apart.py").write_text(REWARD)
    return folder


def runner(folder: Path, name: str = "reward", **settings: Any) -> RewardRunner:
    isolation = {"memory_gb": 1.0} | settings.pop("isolation", {})
    given = {"path": f"apart.py:{name}", "name": "r", "timeout": 20.0, "isolation": isolation}
    return build_rewards([RewardSettings.model_validate(given | settings)], folder)


@pytest.fixture(scope="module")
def skipping(folder: Path) -> Iterator[RewardRunner]:
    made = runner(folder, on_error="skip", timeout=2.0)
    yield made
    made.close()


def group(*texts: str, **columns: Any) -> Group:
    query = Query(({"role": "user", "content": "one?"},), columns, 0, conversational=False)
    return Group(query, tuple(Completion((2,), (0.0,), text, True) for text in texts))


def score(runner: RewardRunner, **columns: Any) -> RewardBatch:
    return runner.score([group("a b", "cde ", **columns)], step=0)


def test_values_and_logs_come_back_and_the_process_is_kept(folder: Path) -> None:
    isolated = runner(folder, options={"factor": 2.0})
    try:
        for call in (1, 2):
            batch = score(isolated)
            assert batch.total.tolist() == [6.0, 8.0]
            assert batch.extras == {"words": [2, 1]}
            assert batch.metrics["calls"] == call
        assert "rlprompt_user_apart" not in " ".join(sys.modules)
    finally:
        isolated.close()


def test_close_ends_the_process_and_a_later_call_starts_one(folder: Path) -> None:
    isolated = runner(folder)
    (pid, _) = score(isolated, task="pid").total.int().tolist()
    isolated.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert score(isolated).total.tolist() == [3.0, 4.0]
    isolated.close()


def test_async_rewards_and_columns_work_in_the_worker(folder: Path) -> None:
    awaited = runner(folder, "awaited")
    picky = runner(folder, "Picky", options={"size": 3})
    try:
        assert score(awaited).total.tolist() == [3.0, 4.0]
        values = score(picky, label="a b", other=1).values["r"]
        assert values[0] == 3.0
        assert values[1].isnan()
        with pytest.raises(InputError, match="needs the dataset column 'label'"):
            score(picky)
    finally:
        awaited.close()
        picky.close()


@pytest.mark.parametrize(
    ("task", "kind", "sentence"),
    [
        ("hang", "timeout", r"than its timeout of 2 s at .*apart.py:\d+ \(time.sleep\(60\)\)"),
        ("hold the lock", "timeout", r"than its timeout of 2 s at .*apart.py:\d+ \(re.match"),
        ("raise", "exception", r"raised ValueError: .* at .*apart.py:\d+ \(return \[int\(text\)"),
        ("exit", "exception", r"raised SystemExit: 3 at .*apart.py:\d+ \(sys.exit\(3\)\)"),
        ("kill", "exception", r"lost its process, which was killed by SIGKILL"),
        ("segfault", "exception", r"lost its process, which was killed by SIGSEGV"),
        ("memory", "exception", r"raised MemoryError: .*mend it or raise isolation.memory_gb"),
        ("NaN", "values", r"returned nan for completion 1 of 2"),
        ("short", "values", r"returned 1 values for 2 completions"),
        ("none", "values", r"returned a value of type NoneType, not a list; return a list"),
        ("set", "values", r"returned a value of type set, not a list; return a list"),
        ("object", "values", r"returned '<object object at .*for completion 1 of 2"),
    ],
)
def test_a_fault_costs_one_batch(
    skipping: RewardRunner, task: str, kind: str, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    batch = score(skipping, task=task)
    (failure,) = batch.errors
    assert failure.kind == kind
    assert re.search(sentence, failure.message), failure.message
    assert failure.message.startswith("reward 'r' ")
    assert "one?" in failure.message
    assert "\n" not in failure.message
    assert failure.message in caplog.text
    assert batch.total.isnan().all()
    assert score(skipping).total.tolist() == [3.0, 4.0]


def test_what_the_reward_started_is_ended_with_it(skipping: RewardRunner, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    (failure,) = score(skipping, task="child", note=str(note)).errors
    assert failure.kind == "timeout"
    time.sleep(0.1)
    state = subprocess.run(["ps", "-o", "stat=", note.read_text()], capture_output=True, text=True)
    assert state.stdout.strip()[:1] in ("", "Z")


def test_on_error_raise_stops_the_run_with_the_same_sentence(folder: Path) -> None:
    isolated = runner(folder)
    try:
        with pytest.raises(InputError, match=r"reward 'r' lost its process, .* for example on"):
            score(isolated, task="kill")
    finally:
        isolated.close()


def test_rewards_in_processes_of_their_own_run_at_the_same_time(folder: Path) -> None:
    (folder / "slow.py").write_text(
        "import time\n\ndef reward(completions):\n"
        "    time.sleep(0.6)\n    return [1.0] * len(completions)\n"
    )
    settings = [
        RewardSettings.model_validate({"path": "slow.py:reward", "name": name, "isolation": {}})
        for name in ("a", "b")
    ]
    rewards = build_rewards(settings, folder)
    try:
        began = time.monotonic()
        assert score(rewards).total.tolist() == [2.0, 2.0]
        assert time.monotonic() - began < 1.15
    finally:
        rewards.close()


def test_wrong_rewards_are_refused_at_the_start(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^reward 'r': size -1 is negative; write a positive one"):
        runner(folder, "Picky", options={"size": -1})
    with pytest.raises(InputError, match=r"^reward 'r': .*apart.py has no object 'rewrad'"):
        runner(folder, "rewrad")
    (folder / "dies.py").write_text("import os\nos._exit(7)\n")
    with pytest.raises(InputError, match=r"its worker process exited with code 7 while loading"):
        runner(folder, path="dies.py:reward")
    (folder / "stays.py").write_text("import time\ntime.sleep(60)\n")
    with pytest.raises(InputError, match=r"did not start within 3 s"):
        runner(folder, path="stays.py:reward", isolation={"start_timeout": 3.0})


def test_a_column_that_cannot_be_sent_is_refused(skipping: RewardRunner) -> None:
    with pytest.raises(InputError, match=r"cannot be sent to the worker process .*local object"):
        score(skipping, odd=lambda: None)


def test_the_worker_ends_when_the_run_is_killed(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from rlprompt.rewards import RewardSettings, build_rewards\n"
        "from rlprompt.types import Completion, Group, Query\n"
        "s = RewardSettings.model_validate({'path': 'apart.py:reward', 'isolation': {}})\n"
        "r = build_rewards([s], Path(sys.argv[1]))\n"
        "q = Query(({'role': 'user', 'content': 'x'},), {'task': 'pid'}, 0, False)\n"
        "b = r.score([Group(q, (Completion((2,), (0.0,), 'a', True),))], step=0)\n"
        "print(int(b.total[0]), flush=True)\ntime.sleep(60)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    pid = int(run.stdout.readline())
    os.kill(pid, 0)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        state = subprocess.run(["ps", "-o", "stat=", str(pid)], capture_output=True, text=True)
        if state.stdout.strip()[:1] in ("", "Z"):
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived the run")
