"""What becomes of each request for an answer: one line of JSON, with the trace that it belongs to.

A line says who asked for which model, under which prompt (by hash), how it ended, how many tokens
and seconds it took. It holds nothing of what was said.

Traces are those of W3C Trace Context: a request with a `traceparent` header is a part of the
client's trace, one without begins its own. `tracestate` is not kept.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from rlprompt.errors import InputError
from rlprompt.files import to_json
from rlprompt.registry.records import now
from rlprompt.serving.chat_answers import Reply
from rlprompt.serving.metrics import Metrics

logger = logging.getLogger(__name__)

_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)


@dataclass(frozen=True)
class Trace:
    """The place of a request in a trace."""

    trace_id: str
    """32 hexadecimal digits, shared by all parts of the trace."""
    span_id: str
    """16 hexadecimal digits: this request."""
    parent_id: str | None = None
    """The client's part that has asked; None where the trace begins here."""
    flags: str = "01"
    """Two hexadecimal digits; 01 = the trace is recorded."""

    @classmethod
    def of(cls, headers: Sequence[str]) -> Trace:
        """The trace that a request belongs to; what is no `traceparent` begins a new one.

        Args:
            headers: all values of `traceparent` that the request has.
        """
        found = _TRACEPARENT.fullmatch(headers[0].strip()) if len(headers) == 1 else None
        span = _identifier(8)
        if found is None or (found[1] == "00" and found[5]):
            return cls(_identifier(16), span)
        return cls(found[2], span, found[3], found[4])

    @property
    def traceparent(self) -> str:
        """The header that names this request as the parent of what comes after it."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


class RequestLog:
    """A file, or standard output, that gets one line of JSON per request."""

    def __init__(self, path: Path | None) -> None:
        """Open it; lines are added to those that are there.

        Args:
            path: the file; None = standard output.

        Raises:
            InputError: it cannot be written.
        """
        self._failed = False
        self._handle: FileIO
        try:
            if path is None:
                self._handle = open(1, "wb", buffering=0, closefd=False)  # noqa: SIM115
            else:
                self._handle = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise InputError(
                f"the log of requests cannot be written to '{path or 'standard output'}' "
                f"({error.strerror}); name a file that can"
            ) from error

    def write(self, row: dict[str, Any]) -> None:
        """Add a line; one that cannot be written is lost, which is told once.

        Args:
            row: its content.
        """
        line = (to_json(row) + "\n").encode("utf-8", "backslashreplace")
        try:
            written = self._handle.write(line) or 0
            while written < len(line):
                written += self._handle.write(line[written:]) or 0
            self._failed = False
        except OSError as error:
            if not self._failed:
                logger.warning("requests are not logged: %s", os.strerror(error.errno or 0))
            self._failed = True

    def close(self) -> None:
        """Close the file; twice is fine."""
        self._handle.close()


@dataclass(eq=False)
class RequestRecord:
    """One request for an answer, from its arrival to its end."""

    path: str
    """What was asked, such as `/v1/responses`."""
    trace: Trace
    metrics: Metrics
    log: RequestLog | None = None
    """Where its end is written; None = nowhere."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    key: str = ""
    """Name of the API key; empty without keys."""
    model: str = "unknown"
    """The model, once it is known to be one of ours."""
    reply: Reply | None = None
    """What it is answered with, once it has come so far."""
    begun: float = field(default_factory=time.monotonic)
    first: float | None = None
    """`time.monotonic()` of the first token."""
    _ended: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """What the answer says, so that a client can name the request."""
        return {"x-request-id": self.id, "traceparent": self.trace.traceparent}

    def told_first(self) -> None:
        """Note that the first token is there."""
        self.first = time.monotonic()

    def end(self, status: int, code: str | None = None) -> None:
        """Count the request and log it; only the first end counts.

        Args:
            status: HTTP status; 499 = the client has gone.
            code: word for what was wrong, as the client was told it.
        """
        if self._ended:
            return
        self._ended = True
        self.metrics.add("rlprompt_requests_total", model=self.model, status=str(status))
        if self.log is not None:
            self.log.write(self._row(status, code))

    def _row(self, status: int, code: str | None) -> dict[str, Any]:
        reply = self.reply
        usage = {} if reply is None else reply.usage()
        return {
            "at": now(),
            "request": self.id,
            "trace": self.trace.trace_id,
            "span": self.trace.span_id,
            "parent": self.trace.parent_id,
            "key": self.key or None,
            "path": self.path,
            "model": None if self.model == "unknown" else self.model,
            "prompt": None if reply is None else reply.prompt_hash,
            "stream": None if reply is None else reply.request.stream,
            "status": status,
            "code": code,
            "finish": None if reply is None else [each.finish for each in reply.choices],
            "prompt_tokens": usage.get("prompt_tokens"),
            "completion_tokens": usage.get("completion_tokens"),
            "first_token_seconds": None if self.first is None else self._since(self.first),
            "seconds": self._since(time.monotonic()),
        }

    def _since(self, then: float) -> float:
        return round(then - self.begun, 6)


def _identifier(num_bytes: int) -> str:
    """Random hexadecimal digits that are not all zero."""
    made = secrets.token_hex(num_bytes)
    return made if made.strip("0") else _identifier(num_bytes)
