"""The process of an isolated reward.

`isolation` starts it as `python -m rlprompt.rewards.processes.worker`. It reads calls from its
standard input and writes results to what was its standard output; what the reward itself prints
goes to standard error. Calls arrive pickled, from the run that started this process; results go
back as JSON under the id of their call, so that nothing in the run executes what user code made.

The reward has the main thread of this process and whatever goes with it: signals, an event loop.
A process that it forks has neither of the two pipes, and ends where it comes back here.

A call that takes too long is ended from inside by `faulthandler`. Its timer is a C thread: it also
fires when the reward holds the interpreter lock, it tells the line on which the reward hangs, and
it ends this process even when the run is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import fcntl
import inspect
import json
import os
import pickle
import queue
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rlprompt.errors import InputError, describe_error
from rlprompt.process_exit import forks_end, no_handler
from rlprompt.rewards.base import RewardFunction, RewardSettings
from rlprompt.rewards.load import load_reward
from rlprompt.rewards.processes.execution import is_async, provide_event_loop
from rlprompt.rewards.processes.pipe import Message, read_message, write_message
from rlprompt.rewards.sharing import wants_first_rank
from rlprompt.rewards.validation import NOT_A_LIST, Sink, plain_value, source_file, user_place

_GIB = 2**30
_OUT_OF_THE_WAY = 4096
"""Descriptors of the pipes lie just below this, or below what the system allows: code that closes
or writes to the first so many does not meet them."""


class _Pipes(NamedTuple):
    """Descriptors of the two pipes."""

    calls: int
    results: int


def main() -> None:
    """Load the reward that the first message names, then serve calls until the input ends."""
    pipes = _claim_streams()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, no_handler)  # they are the run's
    jobs: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_feed, args=(pipes.calls, jobs), daemon=True).start()
    call, body = jobs.get()
    start = pickle.loads(body)
    sys.path[:] = start["sys_path"]
    try:
        settings = RewardSettings.model_validate(start["settings"])
        with forks_end():
            reward = load_reward(settings, Path(start["base_dir"]), start["builtin"])
        _answer(pipes, call, _to_json({"hello": _describe(reward)}))
    except InputError as error:
        _answer(pipes, call, _to_json({"input_error": str(error)}))
        return
    _limit_memory(start["memory_gb"])
    loop = asyncio.Runner()  # one for all calls: clients that a reward keeps belong to their loop
    while True:
        call, body = jobs.get()
        if start["timeout"] is not None:
            faulthandler.dump_traceback_later(start["timeout"], exit=True, file=sys.stderr)
        with forks_end():
            result = _serve(reward, body, loop)
        faulthandler.cancel_dump_traceback_later()
        _answer(pipes, call, result)


def _claim_streams() -> _Pipes:
    """The two pipes, under descriptors that user code does not know; its children have neither."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = _OUT_OF_THE_WAY if soft == resource.RLIM_INFINITY else min(soft, _OUT_OF_THE_WAY)
    lowest = max(3, top - 8)
    pipes = _Pipes(*(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest) for fd in (0, 1)))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    os.register_at_fork(after_in_child=lambda: _close(pipes))
    return pipes


def _close(pipes: _Pipes) -> None:
    for fd in pipes:
        with contextlib.suppress(OSError):
            os.close(fd)


def _answer(pipes: _Pipes, call: bytes, result: bytes) -> None:
    """Send a result; without a pipe to send it through there is nothing left to do here."""
    try:
        write_message(pipes.results, call, result)
    except BrokenPipeError:  # the run is gone
        _end_session()
    except OSError as error:
        os.write(2, f"the reward closed the pipe of its answers ({error})\n".encode())
        os._exit(1)


def _feed(calls: int, jobs: queue.SimpleQueue[Message]) -> None:
    """Pass calls on; when the run closes the pipe or is gone, end this process at once."""
    try:
        while (message := read_message(calls)) is not None:
            jobs.put(message)
    finally:
        _end_session()


def _end_session() -> NoReturn:
    """End this process, and with it all that the reward has started and left in its session."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _limit_memory(gigabytes: float | None) -> None:
    if gigabytes is None:
        return
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    limit = held + int(gigabytes * _GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _describe(reward: RewardFunction) -> dict[str, Any]:
    """What the run must know to call the reward as if it had loaded it."""
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):
        parameters = inspect.signature(lambda **kwargs: None).parameters.values()
    return {
        "parameters": [[p.name, int(p.kind), p.default is not p.empty] for p in parameters],
        "bound": list(getattr(reward, "keywords", {})),
        "source": source_file(reward),
        "on_first_rank": wants_first_rank(reward),
    }


def _serve(reward: RewardFunction, message: bytes, loop: asyncio.Runner) -> bytes:
    """One call to one result; whatever the reward raises becomes a sentence."""
    sink = Sink()
    logs = {"log_extra": sink.log_extra, "log_metric": sink.log_metric}
    try:
        call = pickle.loads(message)
        kwargs = call["kwargs"] | {name: logs[name] for name in call["logs"]}
        if is_async(reward):
            output = loop.run(_awaited(reward, kwargs))
        else:
            provide_event_loop()
            output = reward(**kwargs)
        if getattr(output, "ndim", None) == 1 and hasattr(output, "tolist"):
            output = output.tolist()
        if not isinstance(output, list | tuple):
            if inspect.iscoroutine(output):
                output.close()
            told = f"returned a value of type {type(output).__name__}, not a list; {NOT_A_LIST}"
            return _to_json({"unusable": told})
        sink.close()
        values = [plain_value(value) for value in output]
        return _to_json({"output": values, "extras": sink.extras, "metrics": sink.metrics})
    except InputError as error:
        return _to_json({"input_error": str(error)})
    except BaseException as error:  # sys.exit in user code must not end the worker unseen
        where = user_place(error, reward)
        return _to_json({"raised": f"{describe_error(error)} at {where}"})


async def _awaited(reward: RewardFunction, kwargs: dict[str, Any]) -> Any:
    return await reward(**kwargs)


def _to_json(result: dict[str, Any]) -> bytes:
    return json.dumps(result, default=plain_value).encode()


if __name__ == "__main__":
    main()
