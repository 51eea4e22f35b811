"""Rewards that fork, leave, write where they should not, and start processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlprompt.process_exit import forks_end, no_handler
from rlprompt.rewards import RewardRunner, RewardSettings, build_rewards
from rlprompt.rewards.processes.pipe import Channel, new_call, read_message, write_message
from rlprompt.runs.interrupt import StopRequest
from rlprompt.types import Completion, Group, Query

REWARDS = """
import asyncio, atexit, concurrent.futures, json, multiprocessing, os, signal, struct, sys
import subprocess, threading, time

CALLS = []
KEPT = []


def echo(completions):
    CALLS.append(1)
    return [float(text) for text in completions]


def in_child(then):
    if not CALLS and os.fork() == 0:
        time.sleep(0.1)
        then()


def child_returns(completions, **kwargs):
    in_child(lambda: None)
    return echo(completions)


def child_returns_late(completions, **kwargs):
    in_child(lambda: time.sleep(0.6))
    return echo(completions)


def child_raises(completions, **kwargs):
    in_child(lambda: 1 / 0)
    return echo(completions)


def child_exits(completions, **kwargs):
    in_child(lambda: sys.exit(1))
    return echo(completions)


def child_leaves(completions, **kwargs):
    in_child(lambda: os._exit(0))
    return echo(completions)


def child_has_handlers(completions, **kwargs):
    if not CALLS:
        atexit.register(print, "left", file=sys.stderr)
    in_child(lambda: None)
    return echo(completions)


def thread_forks(completions, **kwargs):
    if not CALLS:
        thread = threading.Thread(target=lambda: os.fork())
        thread.start()
        thread.join()
    return echo(completions)


async def awaited_child(completions, **kwargs):
    in_child(lambda: None)
    await asyncio.sleep(0)
    return echo(completions)


class ChildMade:
    def __init__(self):
        if os.fork() == 0:
            time.sleep(0.1)

    def __call__(self, completions, **kwargs):
        return echo(completions)


def writes_everywhere(completions, **kwargs):
    answer = json.dumps({"output": [9.0] * len(completions), "extras": {}, "metrics": {}}).encode()
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
        try:
            os.write(fd, struct.pack("<Q", len(answer)) + answer)
        except OSError:
            pass
    print("printed")
    sys.__stdout__.write("written")
    sys.__stdout__.flush()
    return echo(completions)


def closes_descriptors(completions, **kwargs):
    os.closerange(3, 256)
    return echo(completions)


def closes_all_descriptors(completions, **kwargs):
    os.closerange(3, 1 << 16)
    return echo(completions)


def logs_from_a_thread(completions, log_metric, **kwargs):
    def late():
        time.sleep(0.15)
        log_metric("late", 1.0)
    threading.Thread(target=late).start()
    return echo(completions)


def in_pool(completions, **kwargs):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(float, completions)


def in_kept_pool(completions, **kwargs):
    if not KEPT:
        KEPT.append(multiprocessing.get_context("fork").Pool(2))
    return KEPT[0].map(float, completions)


def in_executor(completions, **kwargs):
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        return list(pool.map(float, completions))


def in_kept_executor(completions, **kwargs):
    if not KEPT:
        context = multiprocessing.get_context("fork")
        KEPT.append(concurrent.futures.ProcessPoolExecutor(2, mp_context=context))
    return list(KEPT[0].map(float, completions))


def in_threads(completions, **kwargs):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(float, completions))


def in_process(completions, **kwargs):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put([float(text) for text in completions]))
    process.start()
    values = queue.get()
    process.terminate()
    process.join()
    return values


def in_subprocess(completions, **kwargs):
    code = "import sys; print(*map(float, sys.argv[1:]))"
    made = subprocess.run([sys.executable, "-c", code, *completions], stdout=subprocess.PIPE)
    return [float(word) for word in made.stdout.split()]


def leaves_a_holder_and_dies(completions, **kwargs):
    subprocess.Popen(["sleep", "20"], close_fds=False, start_new_session=True)
    if os.fork() == 0:
        os.setsid()
        time.sleep(20)
        os._exit(0)
    os._exit(7)
"""

FORKS = (
    "child_returns",
    "child_returns_late",
    "child_raises",
    "child_exits",
    "child_leaves",
    "child_has_handlers",
    "thread_forks",
    "awaited_child",
    "ChildMade",
)
POOLS = (
    "in_pool",
    "in_kept_pool",
    "in_executor",
    "in_kept_executor",
    "in_threads",
    "in_process",
    "in_subprocess",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "hostile.py").write_text(REWARDS)
    return folder


@pytest.fixture(params=[True, False], ids=["isolated", "in the run"])
def isolation(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"isolation": {"memory_gb": 1.0} if request.param else None}


@pytest.fixture
def started() -> Iterator[list[RewardRunner]]:
    runners: list[RewardRunner] = []
    yield runners
    for runner in runners:
        runner.close()


def build(folder: Path, name: str, **settings: Any) -> RewardRunner:
    # A file of its own, so that what a module keeps is one test's.
    copy = folder / f"{name}_{time.monotonic_ns()}.py"
    copy.write_text(REWARDS)
    given = {"path": f"{copy}:{name}", "name": "r", "timeout": None} | settings
    return build_rewards([RewardSettings.model_validate(given)], folder)


def group(*texts: str) -> Group:
    query = Query(({"role": "user", "content": "one?"},), {}, 0, conversational=False)
    return Group(query, tuple(Completion((2,), (0.0,), text, True) for text in texts))


def values(runner: RewardRunner, batch: int) -> list[float]:
    texts = [str(10 * batch + place) for place in range(3)]
    return runner.score([group(*texts)], step=batch).total.tolist()


def expected(batch: int) -> list[float]:
    return [10.0 * batch + place for place in range(3)]


def children_of(pid: int) -> list[str]:
    shown = subprocess.run(
        ["ps", "-ww", "--ppid", str(pid), "-o", "stat=,args="], capture_output=True, text=True
    )
    lines = [line.strip() for line in shown.stdout.splitlines()]
    return [line for line in lines if not line.startswith("Z") and "--ppid" not in line]


@pytest.mark.parametrize("name", FORKS)
def test_every_batch_gets_its_own_values_whatever_a_forked_child_does(
    folder: Path, name: str, isolation: dict[str, Any], started: list[RewardRunner]
) -> None:
    before = os.getpid()
    runner = build(folder, name, **isolation)
    assert os.getpid() == before
    started.append(runner)
    for batch in range(4):
        assert values(runner, batch) == expected(batch)
        time.sleep(0.2)
    deadline = time.monotonic() + 3
    while [each for each in children_of(before) if "worker" not in each]:
        assert time.monotonic() < deadline, children_of(before)
        time.sleep(0.05)


def test_a_fork_while_the_file_is_imported_makes_no_second_worker(
    folder: Path, started: list[RewardRunner]
) -> None:
    (folder / "forks.py").write_text(
        "import os, time\nif os.fork() == 0:\n    time.sleep(0.2)\n"
        "def reward(completions):\n    return [float(text) for text in completions]\n"
    )
    for isolated in ({"memory_gb": 1.0}, None):
        given = {"path": "forks.py:reward", "timeout": 20.0, "isolation": isolated}
        runner = build_rewards([RewardSettings.model_validate(given)], folder)
        started.append(runner)
        for batch in range(3):
            assert values(runner, batch) == expected(batch)
            time.sleep(0.15)


@pytest.mark.parametrize("name", ["writes_everywhere", "closes_descriptors", "logs_from_a_thread"])
def test_messages_survive_what_the_reward_does_to_descriptors(
    folder: Path, name: str, started: list[RewardRunner]
) -> None:
    runner = build(folder, name, isolation={"memory_gb": 1.0})
    started.append(runner)
    for batch in range(3):
        assert values(runner, batch) == expected(batch)
        time.sleep(0.1)
    assert runner.score([group("1")], step=0).metrics.get("late") is None


def test_a_reward_that_closes_the_pipe_itself_costs_its_batch(
    folder: Path, started: list[RewardRunner]
) -> None:
    given = {"isolation": {"memory_gb": 1.0}, "on_error": "skip"}
    runner = build(folder, "closes_all_descriptors", **given)
    started.append(runner)
    (failure,) = runner.score([group("1")], step=0).errors
    assert "closed the pipe of its answers" in failure.message


def test_a_worker_that_dies_is_noticed_though_a_process_it_started_holds_its_pipes(
    folder: Path, started: list[RewardRunner]
) -> None:
    given = {"isolation": {"memory_gb": 1.0}, "on_error": "skip"}
    runner = build(folder, "leaves_a_holder_and_dies", **given)
    started.append(runner)
    began = time.monotonic()
    (failure,) = runner.score([group("1")], step=0).errors
    assert "exited with code 7" in failure.message
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", POOLS)
def test_pools_and_processes_work_and_leave_no_worker(
    folder: Path, name: str, isolation: dict[str, Any]
) -> None:
    """In a process of its own, as a run is, with a run's signal handlers, and ended as a run is."""
    code = f"""
    import json, os, sys
    from pathlib import Path
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import test_hostile as cases
    from rlprompt.process_exit import process_end
    from rlprompt.runs.interrupt import StopRequest
    with process_end(), StopRequest():
        runner = cases.build(Path(sys.argv[1]), sys.argv[2], **json.loads(sys.argv[3]))
        for batch in range(3):
            assert cases.values(runner, batch) == cases.expected(batch)
        runner.close()
    """

    given = isolation | {"timeout": 60.0}
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(folder), name, json.dumps(given)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _, said = run.communicate(timeout=200)
    assert run.returncode == 0, said
    left = subprocess.run(["pgrep", "-f", f"{folder}.*{name}"], capture_output=True, text=True)
    assert not left.stdout.strip()


def test_pool_workers_end_when_the_run_is_killed(folder: Path, tmp_path: Path) -> None:
    note = tmp_path / "pids"
    (folder / "kept.py").write_text(
        "import multiprocessing, os\nPOOLS = []\n"
        "def pid(_):\n    return os.getpid()\n"
        "def reward(completions):\n"
        "    POOLS.append(multiprocessing.get_context('fork').Pool(2))\n"
        f"    open({str(note)!r}, 'w').write(' '.join(map(str, POOLS[0].map(pid, range(8)))))\n"
        "    return [0.0] * len(completions)\n"
    )
    code = f"""
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import test_hostile as cases
    from rlprompt.rewards import RewardSettings, build_rewards
    given = {{"path": "kept.py:reward", "isolation": {{}}}}
    runner = build_rewards([RewardSettings.model_validate(given)], Path(sys.argv[1]))
    runner.score([cases.group("1")], step=0)
    print("scored", flush=True)
    time.sleep(60)
    """
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "scored\n"
    run.kill()
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 5
    pids = {int(pid) for pid in note.read_text().split()}
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_forked_children_obey_signals_that_a_run_only_notes() -> None:
    with StopRequest() as stop:
        pid = os.fork()
        if pid == 0:
            time.sleep(20)
            os._exit(0)
        time.sleep(0.1)
        for ignored in (signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, ignored)
        time.sleep(0.1)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert stop.reason is None
    no_handler(signal.SIGTERM, None)


def test_a_signal_from_a_childs_first_moment_is_obeyed() -> None:
    """A pool that ends before its last worker is up sends SIGTERM once, and waits for ever."""
    code = """
    import os, signal, time
    os.register_at_fork(after_in_child=lambda: time.sleep(0.5))  # runs before what is mended
    import rlprompt.process_exit
    from rlprompt.runs.interrupt import StopRequest
    with StopRequest():
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        os.kill(pid, signal.SIGTERM)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == -signal.SIGTERM, code
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=100)


@pytest.mark.parametrize("raised", [None, ValueError("x"), SystemExit(3), KeyboardInterrupt()])
def test_a_block_of_user_code_has_one_way_out(raised: BaseException | None) -> None:
    read, write = os.pipe()
    try:
        with forks_end():
            pid = os.fork()
            if pid == 0 and raised is not None:
                raise raised
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == (0 if raised is None else 1)
    finally:
        os.close(read)
        os.close(write)


def test_an_answer_counts_under_the_id_of_its_call_alone() -> None:
    answers, calls = os.pipe(), os.pipe()
    channel = Channel(answers[0], calls[1], 1000, lambda: False)
    first, second = new_call(), new_call()
    try:
        channel.send(first, b"question", None)
        assert read_message(calls[0]) == (first, b"question")
        os.write(answers[1], b"\x05\0\0\0\0\0\0\0hello" * 9)
        write_message(answers[1], first, b"late")
        os.write(answers[1], second[:7])
        write_message(answers[1], second, b"right")
        assert channel.receive(second, time.monotonic() + 1) == b"right"
        with pytest.raises(TimeoutError):
            channel.receive(first, time.monotonic() + 0.1)
        os.write(answers[1], first + (10).to_bytes(8, "little") + b"x" * 26)
        with pytest.raises(ValueError, match="written into"):
            channel.receive(first, time.monotonic() + 1)
        os.write(answers[1], first + (1001).to_bytes(8, "little"))
        with pytest.raises(ValueError, match="at most 1000"):
            channel.receive(first, time.monotonic() + 1)
    finally:
        for fd in (*answers, *calls):
            os.close(fd)


def test_what_the_process_left_in_the_pipe_is_read_before_it_counts_as_gone() -> None:
    answers, calls = os.pipe(), os.pipe()
    channel = Channel(answers[0], calls[1], 1000, lambda: True)
    call = new_call()
    try:
        write_message(answers[1], call, b"last words")
        assert channel.receive(call, None) == b"last words"
        with pytest.raises(EOFError):
            channel.receive(call, None)
    finally:
        for fd in (*answers, *calls):
            os.close(fd)
