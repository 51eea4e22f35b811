"""Requests to a reward server, as bytes over sockets: whatever serves them is a black box here."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.fuzzing.judge import SECRET, Case
from benchmarks.fuzzing.mutate import STRANGE, mutated_bytes, mutated_tree
from rlprompt.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
_BODY: dict[str, Any] = {
    "prompts": ["What is rain?", "What is sun?"],
    "completions": ["Water.", "A star, of course."],
    "completion_ids": [[1, 2], [3, 4, 5]],
    "columns": {"level": [1, None]},
    "step": 3,
}
_ANSWER_SECONDS = 20.0
_GROWTH_BYTES = 200 << 20


class Server:
    """`rlprompt reward serve` in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.port = process, port

    def open_files(self) -> int:
        """File descriptors that it holds."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident_bytes(self) -> int:
        """Memory that it holds."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def is_well(self) -> bool:
        """Whether it answers."""
        url = f"http://127.0.0.1:{self.port}/health"
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False


@contextmanager
def serving() -> Iterator[Server]:
    """A server of the reward `builtin:length` that asks for a token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rlprompt", "reward", "serve", "builtin:length"]
    command += ["--port", str(port), *_options()]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FUZZ_TOKEN": SECRET},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server = Server(process, port)
    try:
        deadline = time.monotonic() + 120
        while not server.is_well():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the reward server does not start")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _options() -> list[str]:
    return ["--option", "max=4", "--token-env", "FUZZ_TOKEN"]


def _request(body: bytes, **headers: str) -> bytes:
    given = {
        "Host": "x",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Authorization": f"Bearer {SECRET}",
        "Connection": "close",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"POST /score HTTP/1.1\r\n{lines}\r\n".encode("latin-1", "replace") + body


def _invalid() -> dict[str, bytes]:
    good = json.dumps(_BODY).encode()
    deep = b"[" * 100_000
    digits = b'{"prompts": [], "completions": [], "step": ' + b"9" * 5000 + b"}"
    return {
        "no token": _request(good, Authorization=""),
        "a wrong token": _request(good, Authorization="Bearer no"),
        "half of the token": _request(good, Authorization=f"Bearer {SECRET[:-1]}"),
        "deep lists": _request(deep),
        "5000 digits": _request(digits),
        "a list": _request(b"[]"),
        "no JSON": _request(b"{"),
        "an unknown key": _request(b'{"prompts": [], "completions": [], "x": 1}'),
        "unequal lists": _request(b'{"prompts": ["a"], "completions": []}'),
        "two lengths": _request(good).replace(b"Host: x", b"Content-Length: 3"),
        "a negative length": _request(good, Content_Length="-1"),
        "a length that is no number": _request(good, Content_Length="x"),
        "a length of 10^15": _request(good, Content_Length="1000000000000000"),
        "another path": _request(good).replace(b"/score", b"/../etc/passwd"),
        "another method": _request(good).replace(b"POST", b"BREW"),
        "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 300 + b"\r\n\r\n",
    }


def requests(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Requests, each on a connection of its own."""
    del folder
    with serving() as server:
        yield from (_case(server, label, content, True) for label, content in _invalid().items())
        files, memory = server.open_files(), server.resident_bytes()
        for number in range(1, 1_000_000):
            if number % 200 == 0:
                yield Case("the server's health", lambda: _examine(server, files, memory))
            if draw.random() < 0.7:
                tree = mutated_tree(_BODY, draw, STRANGE, ("columns", "step"))
                content = _request(json.dumps(tree).encode())
            else:
                content = mutated_bytes(_request(json.dumps(_BODY).encode()), draw)
            yield _case(server, repr(content[-200:]), content, False)


def _case(server: Server, label: str, content: bytes, invalid: bool) -> Case:
    return Case(label, lambda: _ask(server, content), invalid)


def _ask(server: Server, content: bytes) -> None:
    """Send a request and nothing more; the answer, or the end, must come in time."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=_ANSWER_SECONDS) as sent:
        try:
            sent.sendall(content)
            sent.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise InputError(f"the connection was closed while sending ({error}); none") from error
        answer = b""
        try:
            while more := sent.recv(65536):
                answer += more
        except ConnectionResetError:
            pass
    if SECRET.encode() in answer:
        raise RuntimeError("the answer holds the token")
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    if status == 200:
        _strict(body)
        return
    if status == 500 or b"Traceback" in answer:
        raise RuntimeError(f"status {status}: {body[:200]!r}")
    raise InputError(f"status {status}; the request was refused: {body[:80]!r}")


def _strict(body: bytes) -> None:
    """An answer must be JSON without NaN."""

    def refuse(name: str) -> None:
        raise RuntimeError(f"the answer holds {name}")

    json.loads(body, parse_constant=refuse)


def _examine(server: Server, files: int, memory: int) -> None:
    """The server lives, and has let go of what it took."""
    if not server.is_well():
        raise RuntimeError("the server does not answer any more")
    time.sleep(0.2)
    if server.open_files() > files + 8:
        raise RuntimeError(f"the server holds {server.open_files() - files} more files")
    if server.resident_bytes() > memory + _GROWTH_BYTES:
        raise RuntimeError(f"the server holds {server.resident_bytes() - memory} more bytes")
