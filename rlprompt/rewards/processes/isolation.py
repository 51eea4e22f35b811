"""A reward in a process of its own: user code that hangs, crashes or eats memory costs one batch.

The run never imports the reward's file. A worker process (`rlprompt.rewards.processes.worker`)
loads it, is sent each batch, and sends the values back under the id of that call (see `pipe`). A
worker that dies or misses its deadline is replaced while the run goes on; what then happens to the
batch is the reward's `on_error`.

This guards against faults, not against malice: the worker has the rights of the user.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import inspect
import json
import linecache
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rlprompt.errors import InputError, shorten
from rlprompt.rewards.base import IsolationSettings, ReportedError, RewardSettings
from rlprompt.rewards.processes.pipe import Channel, new_call

logger = logging.getLogger(__name__)

_MAX_RESULT_BYTES = 1 << 28
_LATE = 2.0
"""Seconds after its timeout in which a worker must have ended itself."""
_HANG = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in ')
_KEPT_LINES = 60
_ANSWERS: tuple[Mapping[str, type], ...] = (
    {"output": list, "extras": dict, "metrics": dict},
    {"unusable": str},
    {"raised": str},
    {"input_error": str},
)
"""What an answer to a call may hold: keys and their types."""
_GREETINGS: tuple[Mapping[str, type], ...] = ({"hello": dict}, {"input_error": str})
"""The same of the answer to the first message."""


class IsolatedReward:
    """Calls one reward in a worker process; from outside it is an async reward like any other.

    Args:
        settings: the settings of the reward, with `isolation`.
        base_dir: the folder that its path is relative to.
        builtin: the built-in rewards, name -> `package.module:object`.

    Raises:
        InputError: the worker cannot load the reward or does not answer, or this system cannot
            limit memory.
    """

    def __init__(
        self, settings: RewardSettings, base_dir: Path, builtin: Mapping[str, str]
    ) -> None:
        assert settings.isolation is not None
        self._isolation: IsolationSettings = settings.isolation
        if self._isolation.memory_gb is not None and not sys.platform.startswith("linux"):
            raise InputError(
                f"reward '{settings.name}': isolation.memory_gb limits memory on Linux only; set "
                f"it to null"
            )
        self._name, self._timeout = settings.name, settings.timeout
        self._start = pickle.dumps(
            {
                "settings": settings.model_dump(mode="json"),
                "base_dir": str(base_dir),
                "builtin": dict(builtin),
                "sys_path": list(sys.path),
                "memory_gb": self._isolation.memory_gb,
                "timeout": settings.timeout,
            }
        )
        self._worker: _Worker | None = None
        hello = self._greet(self._running())
        self.__signature__ = inspect.Signature(
            [
                inspect.Parameter(
                    name,
                    inspect._ParameterKind(kind),
                    default=None if has_default else inspect.Parameter.empty,
                )
                for name, kind, has_default in hello["parameters"]
            ]
        )
        self.keywords = dict.fromkeys(hello["bound"])
        self._source = hello["source"]
        self.on_first_rank = bool(hello["on_first_rank"])
        """Whether the reward says that it is for the first rank."""
        self.backstop = self._isolation.start_timeout + 2 * _LATE
        """Seconds beyond the timeout that a call may take: the worker may have to start first."""

    async def __call__(self, **kwargs: Any) -> Any:
        """Values of a batch, as the reward in the worker returned them.

        Raises:
            ReportedError: the reward raised, took too long, or its process died.
            InputError: the reward raised it, or a column cannot be sent to another process.
        """
        logs = {key: kwargs.pop(key) for key in ("log_extra", "log_metric") if key in kwargs}
        result = await asyncio.to_thread(self._call, kwargs, list(logs))
        for column, values in result["extras"].items():
            logs["log_extra"](column, values)
        for name, numbers in result["metrics"].items():
            for number in numbers:
                logs["log_metric"](name, number)
        return result["output"]

    def close(self) -> None:
        """End the worker process; a later call starts a new one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def _call(self, kwargs: dict[str, Any], logs: list[str]) -> dict[str, Any]:
        try:
            message = pickle.dumps({"kwargs": kwargs, "logs": logs})
        except Exception as error:
            raise InputError(
                f"the batch cannot be sent to the worker process ({shorten(str(error))}); leave "
                f"out the column that holds such objects, or remove isolation"
            ) from error
        worker = self._running()
        try:
            self._greet(worker)
        except InputError as error:  # it could be loaded when the run began
            raise ReportedError(f"could not be started again: {error}") from error
        began = time.monotonic()
        deadline = None if self._timeout is None else began + self._timeout + _LATE
        call = new_call()
        try:
            worker.channel.send(call, message, deadline)
            result = _parsed(worker.channel.receive(call, deadline), _ANSWERS)
        except (EOFError, TimeoutError, ValueError) as error:
            late = self._timeout is not None and time.monotonic() - began >= self._timeout
            how = worker.kill()
            self._worker = _Worker(self._start)  # it loads while the run goes on
            raise self._obituary(worker, how, error, late) from error
        return self._unpacked(result)

    def _running(self) -> _Worker:
        if self._worker is None:
            self._worker = _Worker(self._start)
        return self._worker

    def _greet(self, worker: _Worker) -> dict[str, Any]:
        """Wait until a worker has loaded the reward; one that has answered is not asked again."""
        if worker.hello is not None:
            return worker.hello
        limit = self._isolation.start_timeout
        prefix = f"reward '{self._name}': its worker process"
        try:
            answer = worker.channel.receive(worker.start, time.monotonic() + limit)
            told = _parsed(answer, _GREETINGS)
        except (EOFError, TimeoutError, ValueError) as error:
            how = worker.kill()
            self._worker = None
            why = f"{how} while loading" if how else f"did not start within {limit:g} s"
            raise InputError(
                f"{prefix} {why}{_last_words(worker)}; mend the reward or raise "
                f"isolation.start_timeout"
            ) from error
        if "input_error" in told:
            self.close()
            raise InputError(told["input_error"])
        worker.hello = told["hello"]
        return worker.hello

    def _obituary(self, worker: _Worker, how: str, error: Exception, late: bool) -> ReportedError:
        """What to say of a worker that died, hung or talked nonsense."""
        ended_itself = late and any("Timeout (" in line for line in worker.lines)
        if isinstance(error, TimeoutError) or ended_itself:
            return ReportedError(
                f"took longer than its timeout of {self._timeout:g} s"
                f"{_hanging_at(worker.lines, self._source)}, so its process was ended",
                "make it faster or raise the timeout",
                "timeout",
            )
        if isinstance(error, EOFError):
            advice = "mend it"
            if how == "was killed by SIGKILL":
                advice = "mend it, or give the machine more memory if that ran out"
            return ReportedError(f"lost its process, which {how}{_last_words(worker)}", advice)
        return ReportedError(f"sent something unusable ({error})", "mend it")

    def _unpacked(self, result: dict[str, Any]) -> dict[str, Any]:
        if "input_error" in result:
            raise InputError(result["input_error"])
        if "raised" in result:
            advice = "mend it"
            if "MemoryError" in result["raised"] or "not enough memory" in result["raised"]:
                advice = f"{advice} or raise isolation.memory_gb ({self._isolation.memory_gb})"
            raise ReportedError(f"raised {result['raised']}", advice)
        if "unusable" in result:
            raise ReportedError(result["unusable"], "", "values")
        return result


class _Worker:
    """One worker process, its pipes, and the last lines that it wrote to standard error."""

    def __init__(self, start: bytes) -> None:
        self._process = subprocess.Popen(
            # -P: it finds what this process finds, in the same order.
            [sys.executable, "-P", "-m", "rlprompt.rewards.processes.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that what the reward starts can be ended with it
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.hello: dict[str, Any] | None = None
        self.start = new_call()
        self.channel = Channel(
            process.stdout.fileno(),
            process.stdin.fileno(),
            _MAX_RESULT_BYTES,
            lambda: process.poll() is not None,
        )
        self.lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        self._listener = threading.Thread(
            target=_collect, args=(process.stderr, self.lines), daemon=True
        )
        self._listener.start()
        # One that died at once is told of by whoever waits for its greeting.
        with contextlib.suppress(EOFError, TimeoutError):
            self.channel.send(self.start, start, time.monotonic() + 60.0)

    def kill(self) -> str:
        """End it and what it started; returns how it ended by itself, '' if it had not."""
        deadline = time.monotonic() + 0.5  # its pipe may close a moment before it is gone
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        code = self._process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join(1.0)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        if code is None:
            return ""
        return f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"


def _parsed(message: bytes, forms: Sequence[Mapping[str, type]]) -> dict[str, Any]:
    """The JSON object of a message.

    Raises:
        ValueError: it has none of the forms, each of which is the keys and their types.
    """
    try:
        told = json.loads(message)
    except RecursionError as error:
        raise ValueError("values nested too deeply") from error
    for form in forms if isinstance(told, dict) else ():
        if told.keys() == form.keys() and all(isinstance(told[k], form[k]) for k in form):
            logged = [*told.get("extras", {}).values(), *told.get("metrics", {}).values()]
            if all(isinstance(values, list) for values in logged):
                return dict(told)
    raise ValueError("an answer of another form")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _collect(stream: BinaryIO, lines: collections.deque[str]) -> None:
    """Keep the last lines of a stream, and show them to whoever asks for debug logs."""
    with stream:
        for raw in iter(lambda: stream.readline(4096), b""):
            line = raw.decode(errors="replace").rstrip()
            lines.append(line)
            logger.debug("reward worker: %s", line)


def _last_words(worker: _Worker) -> str:
    words = next((line for line in reversed(worker.lines) if line.strip()), "")
    return f" (its last line: {shorten(words)})" if words else ""


def _hanging_at(lines: collections.deque[str], source: str | None) -> str:
    """` at file:line (function)` of the reward's own code in the traceback of a hang."""
    for line in lines:
        found = _HANG.search(line)
        if found is not None and found["file"] == source:
            linecache.checkcache(found["file"])
            code = linecache.getline(found["file"], int(found["line"])).strip()
            return f" at {found['file']}:{found['line']} ({code})"
    return ""
