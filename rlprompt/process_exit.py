"""How the process ends when user code that cannot be stopped still runs in one of its threads.

A reward that misses its deadline is left behind in its thread. The interpreter then cannot be taken
down in the ordinary way: it would wait for threads that the reward has started, and a thread that
comes back from C++ (any torch operation) to an interpreter that is gone is unwound through frames
that allow no unwinding: "terminate called without an active exception", exit code 134 in place of
the run's. So such a process does all that an exit does except for that, and goes.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE_S = 20.0
"""Seconds that exit handlers may take: one of them may wait for what the lost thread holds."""

_left = threading.Event()


def left_behind() -> None:
    """Note that a thread with user code in it may run on until the process ends."""
    _left.set()


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
