"""The process in which chat templates are rendered; see `rlprompt.model.chat.render`.

It is run as a script and imports nothing of rlprompt. A request is the length of a JSON text in
bytes, four of them, big-endian, then the text; so is its answer. The process ends when nobody can
ask any more, and the kernel ends it when one rendering takes too long.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import struct
import sys
from io import FileIO
from typing import Any

_LENGTH = struct.Struct(">I")
_PARENT_CHECK_MS = 5_000


def main() -> None:
    """Answer requests from stdin on stdout until the other end is closed."""
    cpu_seconds, memory_bytes, most_characters = (int(word) for word in sys.argv[1:4])
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what an import prints must not stand among the answers
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory(memory_bytes)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, also inside of C code
    requests, parent = os.fdopen(0, "rb", buffering=0), os.getppid()
    while (request := _next(requests, parent)) is not None:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        answer = _answer(render_jinja_template, request, most_characters)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        replies.write(_LENGTH.pack(len(answer)) + answer)


def _limit_memory(more: int) -> None:
    with open("/proc/self/statm", "rb") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _next(requests: FileIO, parent: int) -> dict[str, Any] | None:
    """The next request; None when there will be none."""
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    while not poll.poll(_PARENT_CHECK_MS):
        if os.getppid() != parent:  # a fork of it may hold the pipe open
            return None
    header = _exactly(requests, _LENGTH.size)
    if header is None:
        return None
    body = _exactly(requests, _LENGTH.unpack(header)[0])
    return None if body is None else json.loads(body)


def _exactly(requests: FileIO, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        more = requests.read(count - len(parts))
        if not more:
            return None
        parts += more
    return bytes(parts)


def _answer(render: Any, request: dict[str, Any], most_characters: int) -> bytes:
    try:
        (text,), _ = render(
            conversations=[request["messages"]],
            chat_template=request["template"],
            **request["variables"],
        )
        if len(text) > most_characters:
            raise MemoryError(f"it writes more than {most_characters} characters")
        text.encode()  # half of a surrogate pair is no text
        reply = {"text": text}
    except (MemoryError, RecursionError) as error:
        reply = {"limit": f"{type(error).__name__}: {str(error)[:500]}"}
    except BaseException as error:  # a template is a program, so anything may come out of it
        reply = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    return json.dumps(reply).encode()


if __name__ == "__main__":
    main()
