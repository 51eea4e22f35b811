"""Messages between a run and its reward workers: a length, then that many bytes, over a pipe.

Both ends may go wrong at any moment (a worker that hangs reads nothing, one that dies writes half a
message), so the run's end never blocks: each transfer has a deadline.
"""

from __future__ import annotations

import os
import select
import struct
import time
from typing import BinaryIO

_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 20


class Channel:
    """The run's end of a pair of pipes.

    Args:
        read_fd: where messages come from; made non-blocking.
        write_fd: where messages go to; made non-blocking.
        max_bytes: the longest message that is accepted.
    """

    def __init__(self, read_fd: int, write_fd: int, max_bytes: int) -> None:
        self._read_fd, self._write_fd, self._max_bytes = read_fd, write_fd, max_bytes
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)

    def send(self, message: bytes, deadline: float | None) -> None:
        """Write one message.

        Raises:
            TimeoutError: the other end did not take it before `deadline` (of `time.monotonic`).
            EOFError: the other end is gone.
        """
        rest = memoryview(_LENGTH.pack(len(message)) + message)
        while rest:
            _wait(self._write_fd, select.POLLOUT, deadline)
            try:
                rest = rest[os.write(self._write_fd, rest[:_CHUNK]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise EOFError from error

    def receive(self, deadline: float | None) -> bytes:
        """Read one message.

        Raises:
            TimeoutError: it was not complete before `deadline`.
            EOFError: the other end closed the pipe.
            ValueError: it is longer than `max_bytes`.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
        if length > self._max_bytes:
            raise ValueError(f"a message of {length} bytes; at most {self._max_bytes} are read")
        return self._read(length, deadline)

    def _read(self, size: int, deadline: float | None) -> bytes:
        parts: list[bytes] = []
        while size:
            _wait(self._read_fd, select.POLLIN, deadline)
            try:
                part = os.read(self._read_fd, min(size, _CHUNK))
            except BlockingIOError:
                continue
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _wait(fd: int, event: int, deadline: float | None) -> None:
    poll = select.poll()
    poll.register(fd, event)
    left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
    if not poll.poll(left):
        raise TimeoutError


def write_message(stream: BinaryIO, message: bytes) -> None:
    """Write one message to a blocking stream."""
    stream.write(_LENGTH.pack(len(message)) + message)
    stream.flush()


def read_message(stream: BinaryIO) -> bytes | None:
    """Read one message from a blocking stream; None when it has ended."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    message = stream.read(length)
    return message if len(message) == length else None
