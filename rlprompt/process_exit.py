"""How a process with user code in it ends, and the processes that the user code makes.

A reward that misses its deadline is left behind in its thread. The interpreter then cannot be taken
down in the ordinary way: it would wait for threads that the reward has started, and a thread that
comes back from C++ (any torch operation) to an interpreter that is gone is unwound through frames
that allow no unwinding: "terminate called without an active exception", exit code 134 in place of
the run's. So such a process does all that an exit does except for that, and goes.

User code may fork. A child is the user code's own affair, but for two things that are held here. It
takes the signals that this process only notes (`Pool.terminate` waits for its workers to obey
SIGTERM). And when it comes back from the user code, as a child does whose author forgot
`os._exit`, it ends: it must not go on as a second run that writes to the files of the first.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_PATIENCE_S = 20.0
"""Seconds that exit handlers may take: one of them may wait for what the lost thread holds."""

_left = threading.Event()

_NOTING_PACKAGES = ("rlprompt", "uvicorn", "asyncio")
"""Whose signal handlers note a signal for later: a forked child has no later in which to obey."""


def left_behind() -> None:
    """Note that a thread with user code in it may run on until the process ends."""
    _left.set()


def no_handler(number: int, frame: FrameType | None) -> None:
    """A signal handler that does nothing: unlike SIG_IGN it does not outlive exec."""


@contextmanager
def forks_end() -> Iterator[None]:
    """A block of user code: a child process that it forks ends with the block, whatever it raises.

    The child leaves without exit handlers and without flushing what it has inherited; one line on
    standard error says so.
    """
    owner = os.getpid()
    code = 1
    try:
        yield
        code = 0
    finally:
        if os.getpid() != owner:
            with suppress(OSError):
                os.write(
                    2,
                    b"a process that user code had forked came back from it and was ended; end it "
                    b"with os._exit where its work is done\n",
                )
            os._exit(code)


@contextmanager
def process_end() -> Iterator[None]:
    """A block that is all of a process: what it raises decides how the process ends.

    Without a thread left behind nothing is done here. Else the process ends with the code that it
    would have had, after its exit handlers, and without waiting for any thread.
    """
    try:
        yield
        code = 0
    except BaseException as error:
        if not _left.is_set():
            raise
        code = _code_of(error)
    if not _left.is_set():
        return
    last = threading.Timer(_PATIENCE_S, os._exit, (code,))
    last.daemon = True
    last.start()
    _end_children()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)


def _code_of(error: BaseException) -> int:
    """The exit code that the interpreter gives an exception, after showing what it would show."""
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code
    sys.stderr.write(f"{error.code}\n")
    return 1


def _end_children() -> None:
    """Ask the processes that multiprocessing has made to end: its exit handler waits for them."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None:
        for child in multiprocessing.active_children():
            child.terminate()


_mask = threading.local()
"""`before`: the signals that a thread had blocked when it began to fork."""


def _hold_signals() -> None:
    """Before a fork: what is sent to the child from its first moment waits until it obeys."""
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))


def _release_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _obey_signals() -> None:
    """In a forked child: end on SIGTERM; Ctrl-C and the scheduler's warnings are the parent's."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        handler = signal.getsignal(number)
        package = str(getattr(handler, "__module__", "")).split(".")[0]
        if callable(handler) and package in _NOTING_PACKAGES:
            with suppress(ValueError):
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else no_handler)
    _release_signals()


os.register_at_fork(
    before=_hold_signals, after_in_parent=_release_signals, after_in_child=_obey_signals
)
