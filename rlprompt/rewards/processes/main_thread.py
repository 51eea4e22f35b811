"""Rewards that need a main thread, noticed when one asks for what only a main thread has.

A reward with a time limit runs in a thread, where Python refuses signal handlers; so does one that
is scored ahead of its step, or by a server. Code that limits itself by `signal.alarm` fails there,
and where it catches its own exceptions it gives the value of a failure for every completion, in
silence. So the functions of `signal` that belong to the main thread tell of calls from a reward's
thread, whatever the reward makes of the exception; the runner then gives it another thread.

An alarm without a handler would end the whole run: it is refused too.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_ASKED: ContextVar[list[str] | None] = ContextVar("rlprompt_asked_for", default=None)
_MAIN_ONLY = ("signal", "set_wakeup_fd", "alarm", "setitimer")
_WATCHED = "_rlprompt_watched"


@contextmanager
def noticing() -> Iterator[list[str]]:
    """A block with a call of a reward; the list gets the functions that it asked for in vain."""
    asked: list[str] = []
    token = _ASKED.set(asked)
    try:
        yield asked
    finally:
        _ASKED.reset(token)


def watch() -> None:
    """Let the functions of `signal` tell; before user code is imported, which may keep them."""
    for name in _MAIN_ONLY:
        function = getattr(signal, name, None)
        if function is not None and not hasattr(function, _WATCHED):
            setattr(signal, name, _telling(function))


def _telling(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        asked = _ASKED.get()
        if asked is None or threading.current_thread() is threading.main_thread():
            return function(*args, **kwargs)
        if function.__name__ in ("alarm", "setitimer") and not args[-1]:  # it takes one back
            return function(*args, **kwargs)
        asked.append(f"signal.{function.__name__}")
        raise ValueError(f"signal.{function.__name__} only works in the main thread")

    setattr(call, _WATCHED, True)
    return call
