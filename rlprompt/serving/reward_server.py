"""`rlprompt reward serve`: one reward behind HTTP, for runs on other machines.

    POST /score  {"prompts": [...], "completions": [...], "completion_ids": [[...]],
                  "columns": {name: [...]}, "step": n}      ids, columns and step may be left out
    200          {"rewards": [number or null], "extras": {name: [...]}, "metrics": {name: number}}
    GET /health  {"reward": name, "version": ...}

Any other status comes with {"error": sentence}: 400 a wrong request, 401 a wrong token, 411 and 413
no length or too long a body, 500 the reward failed, 503 too many are waiting.

The reward is called by one request at a time: rewards that users write need not be thread-safe.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import socket
import ssl
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from pathlib import Path
from typing import Any

from rlprompt import __version__
from rlprompt.errors import InputError
from rlprompt.rewards.base import RESERVED_KEYWORDS
from rlprompt.rewards.runner import RewardRunner
from rlprompt.types import Completion, Group, Message, Query

logger = logging.getLogger(__name__)

_MAX_CONNECTIONS = 64
_IDLE_SECONDS = 60.0
_ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class ServeOptions:
    """Where and for whom a reward is served."""

    host: str = "127.0.0.1"
    port: int = 8770
    """0 = any free one."""
    token: str | None = None
    """What requests must carry as `Authorization: Bearer TOKEN`; None asks for nothing."""
    max_body_bytes: int = 16_000_000
    max_waiting: int = 32
    """Requests that may wait for the reward before others are sent away with 503."""
    certificate: Path | None = None
    """PEM file with certificate and key; None serves plain HTTP."""


class RewardServer(ThreadingHTTPServer):
    """Serves the one reward of `runner` until `shutdown`.

    Raises:
        InputError: the address cannot be used, or the certificate cannot be read.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, runner: RewardRunner, options: ServeOptions) -> None:
        self.runner, self.options = runner, options
        self.reward_name = runner.settings[0].name
        self.turn = threading.Lock()
        self.waiting = threading.BoundedSemaphore(options.max_waiting)
        self._connections = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        try:
            super().__init__((options.host, options.port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"cannot listen on {options.host}:{options.port} ({error}); choose another address"
            ) from error
        if options.certificate is not None:
            self._encrypt(options.certificate)

    @property
    def url(self) -> str:
        """What a recipe writes as `url`."""
        scheme = "http" if self.options.certificate is None else "https"
        return f"{scheme}://{self.options.host}:{self.server_address[1]}/score"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection, unless there are too many."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is no event."""
        logger.debug("connection of %s broke", client_address, exc_info=True)

    def _encrypt(self, certificate: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(certificate)
        except (OSError, ssl.SSLError) as error:
            self.server_close()
            raise InputError(
                f"certificate {str(certificate)!r} cannot be read ({error}); give a PEM file with "
                f"certificate and key"
            ) from error
        # The handshake waits for the client: leave it to the connection's own thread.
        self.socket = context.wrap_socket(
            self.socket, server_side=True, do_handshake_on_connect=False
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"rlprompt/{__version__}", ""
    timeout = _IDLE_SECONDS  # of the socket: a client that sends nothing does not hold a thread
    server: RewardServer

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, {"reward": self.server.reward_name, "version": __version__})
        else:
            self._answer(404, {"error": "there is only POST /score and GET /health"})

    def do_POST(self) -> None:
        problem = self._refusal()
        if problem is not None:
            self.close_connection = True  # its body was not read
            self._answer(*problem)
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.server.waiting.acquire(blocking=False):
            self._answer(503, {"error": "too many requests are waiting"}, {"Retry-After": "1"})
            return
        try:
            self._answer(*self._score(body))
        finally:
            self.server.waiting.release()

    def _refusal(self) -> tuple[int, dict[str, Any]] | None:
        if self.path != "/score":
            return 404, {"error": "there is only POST /score and GET /health"}
        token = self.server.options.token
        if token is not None:
            given = self.headers.get("Authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {token}".encode()):
                return 401, {"error": "the token is missing or wrong"}
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            return 411, {"error": "a Content-Length is needed"}
        if int(length) > self.server.options.max_body_bytes:
            limit = self.server.options.max_body_bytes
            return 413, {"error": f"the body has {length} bytes; at most {limit} are read"}
        return None

    def _score(self, body: bytes) -> tuple[int, dict[str, Any]]:
        try:
            groups, step = parse_request(json.loads(body))
        except InputError as error:
            return 400, {"error": str(error)}
        except (ValueError, RecursionError):
            return 400, {"error": "the body is not JSON"}
        try:
            with self.server.turn:
                return 200, score(self.server.runner, groups, step)
        except InputError as error:
            logger.warning("%s", error)
            return 500, {"error": str(error)}
        except Exception as error:
            logger.exception("scoring failed")
            return 500, {"error": f"{type(error).__name__} while scoring; see the server's log"}

    def _answer(
        self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        data = json.dumps(body, default=str).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        logger.info("%s %s", self.address_string(), format % args)


def parse_request(request: Any) -> tuple[list[Group], int]:
    """The groups of a request, and its step; neighbours with equal query and columns are a group.

    Raises:
        InputError: it is not of the form that the module describes.
    """
    if not isinstance(request, dict):
        raise InputError("the request is not an object; send prompts and completions")
    known = {"prompts", "completions", "completion_ids", "columns", "step"}
    unknown = sorted(set(request) - known)
    if unknown:
        raise InputError(f"unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    prompts = _list(request, "prompts")
    completions = _list(request, "completions", len(prompts))
    ids = request.get("completion_ids") or [[0]] * len(prompts)
    ids = _list({"completion_ids": ids}, "completion_ids", len(prompts))
    step = request.get("step", 0)
    if not isinstance(step, int):
        raise InputError("step is not an integer; correct it")
    columns = _columns(request.get("columns", {}), len(prompts))
    rows = [
        (_messages(prompt), isinstance(prompt, list), {k: v[i] for k, v in columns.items()})
        for i, prompt in enumerate(prompts)
    ]
    if len({conversational for _, conversational, _ in rows}) > 1:
        raise InputError("some prompts are strings and some lists of messages; send one kind")
    groups = []
    for _, part in groupby(range(len(rows)), key=lambda i: repr(rows[i])):
        positions = list(part)
        messages, conversational, row = rows[positions[0]]
        query = Query(messages, row, positions[0], conversational)
        made = tuple(_completion(completions[i], ids[i]) for i in positions)
        groups.append(Group(query, made))
    return groups, step


def score(runner: RewardRunner, groups: Sequence[Group], step: int) -> dict[str, Any]:
    """The answer to a request: values of the runner's first reward, and what it logged."""
    if not groups:
        return {"rewards": [], "extras": {}, "metrics": {}}
    batch = runner.score(groups, step=step)
    values = batch.values[runner.settings[0].name].tolist()
    metrics = {k: v for k, v in batch.metrics.items() if not k.startswith("rewards/")}
    return {
        "rewards": [None if math.isnan(value) else value for value in values],
        "extras": batch.extras,
        "metrics": metrics,
    }


def _list(request: Mapping[str, Any], key: str, length: int | None = None) -> list[Any]:
    values = request.get(key)
    if not isinstance(values, list):
        raise InputError(f"{key} is missing or not a list; send one entry per completion")
    if length is not None and len(values) != length:
        raise InputError(f"{key} has {len(values)} entries for {length} prompts; send as many")
    return values


def _columns(columns: Any, length: int) -> dict[str, list[Any]]:
    if not isinstance(columns, dict):
        raise InputError("columns is not an object; send {name: [value per completion]}")
    for name in columns:
        if name in RESERVED_KEYWORDS:
            raise InputError(f"the column {name!r} has a reserved name; rename it")
    return {name: _list(columns, name, length) for name in columns}


def _messages(prompt: Any) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    if isinstance(prompt, list) and prompt and all(_is_message(each) for each in prompt):
        return tuple({"role": each["role"], "content": each["content"]} for each in prompt)
    raise InputError("a prompt is neither a string nor a list of messages; correct it")


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in _ROLES
        and isinstance(value.get("content"), str)
    )


def _completion(completion: Any, ids: Any) -> Completion:
    text = completion
    if isinstance(completion, list) and len(completion) == 1 and _is_message(completion[0]):
        text = completion[0]["content"]
    if not isinstance(text, str):
        raise InputError("a completion is neither a string nor a list of one message; correct it")
    if not isinstance(ids, list) or not all(isinstance(each, int) for each in ids):
        raise InputError("completion_ids holds something that is no list of integers; correct it")
    return Completion(tuple(ids), (0.0,) * len(ids), text, True)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on `host`."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(str(each).startswith("127.") or each == "::1" for each in addresses)
