"""Standard output and error that a process outlives.

Whoever reads the output may go at any time: `| head -1`, a terminal that is closed, a full disk
behind `> log`. Python raises then at whatever line is printing, in the middle of a training step,
and logging writes a traceback for every record from then on. Here a stream that cannot be written
any more is told of once and then swallows what it gets. A command that works goes on without it;
one that only shows something ends.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO


class OutlivingStream(io.TextIOWrapper):
    """A text stream for a standard descriptor, whose end is no error of whoever writes.

    Args:
        stream: the stream that it takes the place of, and whose buffer it takes over.
        name: how the sentence about its end calls it.
        ends: whether the process ends with the stream, with exit code 1.
    """

    def __init__(self, stream: io.TextIOWrapper, name: str, *, ends: bool) -> None:
        stream.flush()
        encoding, errors = stream.encoding, stream.errors
        by_line, at_once = stream.line_buffering, stream.write_through
        super().__init__(
            stream.detach(), encoding, errors, line_buffering=by_line, write_through=at_once
        )
        self._called = name
        self.ends = ends
        self._lost = False

    def write(self, text: str) -> int:
        """Write a text, unless the stream has ended.

        Raises:
            SystemExit: it ends now, and the process with it.
        """
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """Hand over what is buffered, unless the stream has ended.

        Raises:
            SystemExit: it ends now, and the process with it.
        """
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        # What is buffered, what is still to come, and what C code writes goes nowhere from now on.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if self._lost:
            return
        self._lost = True
        gone = error.errno == errno.EPIPE
        reason = "is read by nobody any more" if gone else f"cannot be written ({error.strerror})"
        if not self.ends:
            _tell(f"{self._called} {reason}: the command goes on without it", self)
            return
        if not gone:  # who stops reading, as `head` does, has what it wanted
            _tell(f"error: {self._called} {reason}", self)
        raise SystemExit(1)


def hold_standard_streams() -> None:
    """Make output and error of this process streams that it outlives; twice is fine.

    Descriptors that are closed are opened on nothing: a file of the run would take their numbers,
    and with them whatever is printed.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, so this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = _outliving(sys.stdout, 1, "the output", ends=True)
    sys.stderr = _outliving(sys.stderr, 2, "the error output", ends=False)


def outlive_output() -> None:
    """Go on from here when nobody reads the output any more: there is work to finish."""
    if isinstance(sys.stdout, OutlivingStream):
        sys.stdout.ends = False


def _outliving(stream: TextIO | None, descriptor: int, name: str, *, ends: bool) -> TextIO:
    if stream is None:
        buffer = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))
        stream = io.TextIOWrapper(buffer, "utf-8", "backslashreplace")
    if type(stream) is io.TextIOWrapper:
        return OutlivingStream(stream, name, ends=ends)
    return stream  # somebody else's, a notebook's or a test's


def _tell(sentence: str, about: object) -> None:
    if sys.stderr is not about and sys.stderr is not None:
        sys.stderr.write(f"{sentence}\n")
