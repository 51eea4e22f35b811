"""Messages between a run and its reward workers, over a pair of pipes.

A message is the id of its call, its length, that many bytes, and a digest of both. The run draws an
id that nobody can guess for every call and takes no answer but the one under it: an answer to an
earlier call, or bytes that user code wrote to a descriptor it does not know, are passed over, and
an answer that something has written into is refused.

Both ends may go wrong at any moment (a worker that hangs reads nothing, one that dies writes half a
message, a child that it forked holds its pipes open), so the run's end never blocks: each transfer
has a deadline, and ends when the process is gone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import select
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

logger = logging.getLogger(__name__)

_ID_BYTES = 16
_HEAD = struct.Struct(f"<{_ID_BYTES}sQ")
_DIGEST_BYTES = 16
_CHUNK = 1 << 20
_SLICE = 0.5
"""Seconds between two looks at whether the other process still lives."""


class Message(NamedTuple):
    """A message of the run."""

    call: bytes
    """The id that the answer must carry."""
    body: bytes


def new_call() -> bytes:
    """An id for a call."""
    return secrets.token_bytes(_ID_BYTES)


class Channel:
    """The run's end of a pair of pipes.

    Args:
        read_fd: where messages come from; made non-blocking.
        write_fd: where messages go to; made non-blocking.
        max_bytes: the longest message that is accepted.
        is_gone: function that says whether the process at the other end has ended.
    """

    def __init__(
        self, read_fd: int, write_fd: int, max_bytes: int, is_gone: Callable[[], bool]
    ) -> None:
        self._read_fd, self._write_fd, self._max_bytes = read_fd, write_fd, max_bytes
        self._is_gone = is_gone
        self._buffer = bytearray()
        self._has_warned = False
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)

    def send(self, call: bytes, body: bytes, deadline: float | None) -> None:
        """Write one message.

        Raises:
            TimeoutError: the other end did not take it before `deadline` (of `time.monotonic`).
            EOFError: the other end is gone.
        """
        rest = memoryview(_framed(call, body))
        while rest:
            self._wait(self._write_fd, select.POLLOUT, deadline)
            try:
                rest = rest[os.write(self._write_fd, rest[:_CHUNK]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise EOFError from error

    def receive(self, call: bytes, deadline: float | None) -> bytes:
        """Read the answer to a call; what comes before it is passed over.

        Raises:
            TimeoutError: it was not complete before `deadline`.
            EOFError: the other end closed the pipe, or its process has ended.
            ValueError: it is longer than `max_bytes`, or something wrote into it.
        """
        self._find(call, deadline)
        self._fill(_HEAD.size, deadline)
        _, length = _HEAD.unpack_from(self._buffer)
        if length > self._max_bytes:
            raise ValueError(f"a message of {length} bytes; at most {self._max_bytes} are read")
        end = _HEAD.size + length
        self._fill(end + _DIGEST_BYTES, deadline)
        body = bytes(self._buffer[_HEAD.size : end])
        digest = bytes(self._buffer[end : end + _DIGEST_BYTES])
        del self._buffer[: end + _DIGEST_BYTES]
        if digest != _digest(call, body):
            raise ValueError("an answer that something else was written into")
        return body

    def _find(self, call: bytes, deadline: float | None) -> None:
        """Read on until the buffer begins with a call's id."""
        while (at := self._buffer.find(call)) < 0:
            self._pass_over(max(0, len(self._buffer) - len(call) + 1))
            self._read(deadline)
        self._pass_over(at)

    def _pass_over(self, count: int) -> None:
        if count and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "a reward's process wrote to the pipe of its answers, which is not its own; what "
                "is no answer is passed over"
            )
        del self._buffer[:count]

    def _fill(self, size: int, deadline: float | None) -> None:
        while len(self._buffer) < size:
            self._read(deadline)

    def _read(self, deadline: float | None) -> None:
        """Add at least one byte to the buffer."""
        while True:
            self._wait(self._read_fd, select.POLLIN, deadline)
            try:
                part = os.read(self._read_fd, _CHUNK)
            except BlockingIOError:
                continue
            if not part:
                raise EOFError
            self._buffer += part
            return

    def _wait(self, fd: int, event: int, deadline: float | None) -> None:
        """Until a descriptor is ready; a child of a process that ended may hold its pipe open."""
        poll = select.poll()
        poll.register(fd, event)
        while True:
            gone = self._is_gone()  # before the look: what it wrote last is there then
            left = _SLICE if deadline is None else min(_SLICE, deadline - time.monotonic())
            if poll.poll(0 if gone else max(0.0, left) * 1000):
                return
            if gone:
                raise EOFError
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError


def write_message(fd: int, call: bytes, body: bytes) -> None:
    """Write one message to a blocking descriptor."""
    rest = memoryview(_framed(call, body))
    while rest:
        rest = rest[os.write(fd, rest[:_CHUNK]) :]


def read_message(fd: int) -> Message | None:
    """Read one message from a blocking descriptor; None when it has ended or is no message."""
    head = _read_all(fd, _HEAD.size)
    if len(head) < _HEAD.size:
        return None
    call, length = _HEAD.unpack(head)
    body = _read_all(fd, length)
    digest = _read_all(fd, _DIGEST_BYTES)
    return Message(call, body) if digest == _digest(call, body) else None


def _framed(call: bytes, body: bytes) -> bytes:
    return _HEAD.pack(call, len(body)) + body + _digest(call, body)


def _digest(call: bytes, body: bytes) -> bytes:
    return hashlib.blake2b(body, key=call, digest_size=_DIGEST_BYTES).digest()


def _read_all(fd: int, size: int) -> bytes:
    parts: list[bytes] = []
    while size and (part := os.read(fd, min(size, _CHUNK))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
