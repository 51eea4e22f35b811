"""Stopping on request: SIGTERM, SIGUSR1 and Ctrl-C end a run after the step in progress.

What can be done again without loss, such as a held-out evaluation, is not waited for.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SCHEDULER = (signal.SIGTERM, signal.SIGUSR1)
_SIGNALS = (*_SCHEDULER, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A stop signal came within a block of `StopRequest.at_once`.

    A Ctrl-C to whoever cleans up on the way out: nobody may take it for a failure of a reward.
    """


class StopRequest:
    """Within its `with` block, the first stop signal is noted; a second Ctrl-C ends at once.

    Blocks may be nested, so that a signal is noted from the moment a command starts: an inner one
    begins with what the outer one was told, and tells it what it was told itself.

    Outside the main thread Python takes no signal handlers; then nothing is noted.
    """

    def __init__(self, *, keyboard: bool = True) -> None:
        """Nothing asked for yet.

        Args:
            keyboard: whether Ctrl-C is noted too; else it does what it did before.
        """
        self._signals = _SIGNALS if keyboard else _SCHEDULER
        self.reason: str | None = None
        """Name of the signal that asked, such as SIGTERM."""
        self._before: dict[signal.Signals, Any] = {}
        self._raises = False

    def __enter__(self) -> StopRequest:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._before[number] = signal.signal(number, self._note)
        if self._outer is not None:
            self.reason = self._outer.reason
        return self

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that the first stop signal leaves at once.

        Raises:
            Stopped: a signal came within the block, or before it.
        """
        if self.reason is not None:
            raise Stopped
        try:
            self._raises = True
            yield
        finally:
            self._raises = False

    @property
    def _outer(self) -> StopRequest | None:
        handler = self._before.get(signal.SIGTERM)
        owner = getattr(handler, "__self__", None)
        return owner if isinstance(owner, StopRequest) else None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the former handlers back."""
        if self._outer is not None:
            self._outer.reason = self.reason
        for number, handler in self._before.items():
            if (
                handler is not None
            ):  # None: it was not set from Python, so Python cannot set it back
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
        if self._raises:
            self._raises = False  # what the block does to clean up is not left
            raise Stopped
