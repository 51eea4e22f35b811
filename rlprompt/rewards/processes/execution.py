"""Calling user code under a deadline: sync rewards in a worker thread, async ones in one loop.

A Python thread cannot be killed. When a sync reward misses its deadline, its thread is left behind
(how the process then ends is in `rlprompt.process_exit`) and a new one serves the next call. One
lost thread may be bad luck; when the same reward misses its deadline again while its first thread
still runs, the run stops whatever `on_error` says. Code that holds the interpreter lock (a
catastrophic regular expression, a C extension) also delays the clock that watches it.

The worker thread is kept between calls: OpenMP builds a thread pool per calling thread, and a
thread per call would leak pools. The event loop is kept too, because HTTP clients that a reward
keeps belong to the loop they were opened in. Sync rewards find an event loop that does not run in
their thread, as they would in a main thread; what else they ask a main thread for is noted in the
outcome (see `main_thread`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import queue
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlprompt.errors import InputError
from rlprompt.process_exit import forks_end, left_behind
from rlprompt.rewards.base import RewardFunction
from rlprompt.rewards.processes.main_thread import noticing

_LAST_SECONDS = 2.0
"""Seconds that an idle thread has to end in."""
ASYNC_GRACE = 5.0
"""Seconds after its timeout in which a cancelled coroutine must give control back."""


@dataclass(frozen=True)
class Call:
    """One reward on one batch."""

    name: str
    function: RewardFunction
    kwargs: dict[str, Any]
    timeout: float | None
    """Seconds; None = no deadline, and a sync function then runs in the calling thread."""


@dataclass(frozen=True)
class Outcome:
    """What came of a call: `output`, unless it raised `error` or `timed_out`."""

    seconds: float
    output: Any = None
    error: BaseException | None = None
    timed_out: bool = False
    asked_for: str = ""
    """What it asked for that only a main thread has, such as `signal.signal`; its output is then
    not to be trusted."""


def is_async(function: RewardFunction) -> bool:
    """True for coroutine functions, partials of them, and objects with an async `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - asks whether it is async, not callable
    )


class Executor:
    """Runs calls for one `RewardRunner`; starts its threads when they are first needed."""

    def __init__(self) -> None:
        self._worker: JobThread | None = None
        self._lost: dict[str, JobThread] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def run_sync(self, call: Call) -> Outcome:
        """Call a plain function and wait for it, at most `call.timeout` seconds.

        Raises:
            InputError: it missed its deadline while an earlier call of it still runs.
        """
        if call.timeout is None:
            return _invoke(call)
        if self._worker is None:
            self._worker = JobThread("rlprompt-rewards")
            self._worker.start()
        worker = self._worker
        answer: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        worker.jobs.put(lambda: answer.put(_invoke(call, in_own_thread=True)))
        try:
            return answer.get(timeout=call.timeout)
        except BaseException as error:  # its deadline, or Ctrl-C
            left_behind()
            worker.jobs.put(None)
            self._worker = None
            if not isinstance(error, queue.Empty):
                raise
        earlier = self._lost.get(call.name)
        if earlier is not None and earlier.is_alive():
            raise InputError(
                f"reward '{call.name}' took longer than its timeout of {call.timeout:g} s again "
                f"while its earlier call still runs; make it faster or raise the timeout"
            )
        self._lost[call.name] = worker
        return Outcome(seconds=call.timeout, timed_out=True)

    def run_async(self, calls: Sequence[Call]) -> list[Outcome]:
        """Await all calls concurrently, each with its own timeout; outcomes in the same order.

        Raises:
            InputError: a coroutine neither ended nor gave control back after its timeout.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(
                target=self._loop.run_forever, daemon=True, name="rlprompt-rewards-async"
            ).start()
        done: dict[str, Outcome] = {}
        future = asyncio.run_coroutine_threadsafe(_gather(calls, done), self._loop)
        timeouts = [call.timeout for call in calls if call.timeout is not None]
        deadline = max(timeouts) + ASYNC_GRACE if len(timeouts) == len(calls) else None
        try:
            future.result(deadline)
        except BaseException as error:
            left_behind()
            if not isinstance(error, concurrent.futures.TimeoutError):
                raise
            self._loop = None
            pending = ", ".join(f"'{call.name}'" for call in calls if call.name not in done)
            raise InputError(
                f"async reward {pending} did not stop at its timeout: it blocks the event loop or "
                f"ignores cancellation; await what takes long, or make it a plain function"
            ) from None
        if any(outcome.timed_out for outcome in done.values()):
            left_behind()  # it was cancelled, but not what it may have waited for in a thread
        return [done[call.name] for call in calls]

    def close(self) -> None:
        """Stop the threads that are idle. A later call starts new ones."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.jobs.put(None)
            # It is idle: a thread that hangs was given up before, and is not waited for.
            if worker is not threading.current_thread():
                worker.join(_LAST_SECONDS)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None


class JobThread(threading.Thread):
    """A daemon thread that runs jobs until it takes None.

    Not a ThreadPoolExecutor: the interpreter joins its threads at exit, and a reward that hangs
    would hang the exit as well.
    """

    def __init__(self, name: str) -> None:
        """Not started yet."""
        super().__init__(daemon=True, name=name)
        self.jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def run(self) -> None:
        """Job by job."""
        loop = asyncio.new_event_loop()
        try:
            while (job := self.jobs.get()) is not None:
                if loop.is_closed():  # by the reward
                    loop = asyncio.new_event_loop()
                asyncio.set_event_loop(loop)
                job()
        finally:
            asyncio.set_event_loop(None)
            loop.close()


def provide_event_loop() -> None:
    """Give the calling thread an event loop if it has none, or one that is closed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # where one is made by asking
            has_one = not asyncio.get_event_loop().is_closed()
    except RuntimeError:
        has_one = False
    if not has_one:
        asyncio.set_event_loop(asyncio.new_event_loop())


def _invoke(call: Call, *, in_own_thread: bool = False) -> Outcome:
    """Call a plain function; a Ctrl-C is the run's, unless the thread can have had none."""
    if not in_own_thread:
        provide_event_loop()
    start = time.perf_counter()
    output, error = None, None
    with forks_end(), noticing() as asked:
        try:
            output = call.function(**call.kwargs)
        except BaseException as raised:  # sys.exit in user code must not end the thread unseen
            if isinstance(raised, KeyboardInterrupt) and not in_own_thread:
                raise
            error = raised
    return Outcome(time.perf_counter() - start, output, error, asked_for=", ".join(asked[:1]))


async def _gather(calls: Sequence[Call], done: dict[str, Outcome]) -> None:
    await asyncio.gather(*(_await_one(call, done) for call in calls))


async def _await_one(call: Call, done: dict[str, Outcome]) -> None:
    start = time.perf_counter()
    output, error = None, None
    scope = asyncio.timeout(call.timeout)
    with forks_end(), noticing() as asked:
        try:
            async with scope:
                output = await call.function(**call.kwargs)
        except (Exception, SystemExit, asyncio.CancelledError) as raised:
            error = raised
    # A TimeoutError of the reward's own (an HTTP client's) is an exception, not our deadline.
    timed_out = scope.expired() and isinstance(error, TimeoutError)
    done[call.name] = Outcome(
        seconds=time.perf_counter() - start,
        output=output,
        error=None if timed_out else error,
        timed_out=timed_out,
        asked_for=", ".join(asked[:1]),
    )
