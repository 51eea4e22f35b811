"""Chat templates rendered in a process of their own, within limits.

A template is a program that comes with a model or an artifact, so from whoever made that. The
sandbox of Jinja keeps it from files and code, and not from loops without end or texts without
limit. Here a rendering has so much CPU time and memory; one that takes more loses its process, and
the next one gets another. One process serves all templates.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CPU_SECONDS = 2
"""Most that one rendering may take; those of published models take milliseconds."""
MEMORY_BYTES = 256 << 20
"""Most that it may take beside what the process has anyway."""
MOST_CHARACTERS = 4_000_000
"""Most that it may write."""

_LENGTH = struct.Struct(">I")
_WALL_SECONDS = 120.0
_MANY = 1000
_WORKER = Path(__file__).with_name("render_worker.py")
_QUIET = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}


class RenderError(ValueError):
    """A template raised an error, or took more than it may; the text says which."""


class LimitError(RenderError):
    """A template took more than it may."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The text of a template for a conversation, as transformers renders it.

    Args:
        template: Jinja source.
        messages: conversation.
        variables: values by the names that the template calls them.
        add_generation_prompt: whether the template is asked for the assistant's header at the end.

    Raises:
        RenderError: the template raised an error, or took more than it may.
    """
    return _RENDERER.ask(
        {
            "template": template,
            "messages": list(messages),
            "variables": {**variables, "add_generation_prompt": add_generation_prompt},
        }
    )


def start() -> None:
    """Start the process, so that it is there when a template is to be rendered."""
    _RENDERER.start()


class _Renderer:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._served = 0

    def start(self) -> None:
        with self._lock:
            self._running()

    def ask(self, request: Mapping[str, Any]) -> str:
        body = json.dumps(request).encode()
        with self._lock:
            reply = self._exchange(body)
            if "limit" in reply and self._served > _MANY:
                self._stop()  # its memory is not what it was: a fresh one decides
                reply = self._exchange(body)
        if "limit" in reply:
            raise LimitError(reply["limit"])
        if "error" in reply:
            raise RenderError(reply["error"])
        return str(reply["text"])

    def _exchange(self, body: bytes) -> dict[str, Any]:
        process = self._running()
        self._served += 1
        try:
            _send(process, _LENGTH.pack(len(body)) + body)
            return _receive(process)
        except (OSError, EOFError):
            self._stop()
            return {"limit": f"it takes more than {CPU_SECONDS} s or {MEMORY_BYTES >> 20} MiB"}
        except BaseException:  # Ctrl-C: the reply to come would be taken for that of the next call
            self._stop()
            raise

    def _running(self) -> subprocess.Popen[bytes]:
        # After a fork the process belongs to the parent, which goes on asking it.
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            limits = [str(each) for each in (CPU_SECONDS, MEMORY_BYTES, MOST_CHARACTERS)]
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER), *limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **_QUIET},
                bufsize=0,
            )
            self._owner = os.getpid()
            self._served = 0
            atexit.register(self.close)
        return self._process

    def close(self) -> None:
        """End the process, if this one has started it."""
        if self._owner == os.getpid():
            self._stop()

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            process.wait()


def _send(process: subprocess.Popen[bytes], content: bytes) -> None:
    assert process.stdin is not None
    view = memoryview(content)
    while view:
        view = view[process.stdin.write(view) or 0 :]


def _receive(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    deadline = time.monotonic() + _WALL_SECONDS
    (length,) = _LENGTH.unpack(_exactly(process, _LENGTH.size, deadline))
    found: dict[str, Any] = json.loads(_exactly(process, length, deadline))
    return found


def _exactly(process: subprocess.Popen[bytes], count: int, deadline: float) -> bytes:
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    parts = bytearray()
    while len(parts) < count:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError("no answer")
        more = process.stdout.read(count - len(parts))
        if not more:
            raise EOFError("the process has ended")
        parts += more
    return bytes(parts)


_RENDERER = _Renderer()
