"""Stopping on request: SIGTERM, SIGUSR1 and Ctrl-C end a run after the step in progress."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Within its `with` block, the first stop signal is noted; a second Ctrl-C ends at once.

    Outside the main thread Python takes no signal handlers; then nothing is noted.
    """

    def __init__(self) -> None:
        """Nothing asked for yet."""
        self.reason: str | None = None
        """Name of the signal that asked, such as SIGTERM."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            if (
                handler is not None
            ):  # None: it was not set from Python, so Python cannot set it back
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
