"""`rlprompt reward serve`: one reward behind HTTP, for runs on other machines.

    POST /score  {"prompts": [...], "completions": [...], "completion_ids": [[...]],
                  "columns": {name: [...]}, "step": n}      ids, columns and step may be left out
    200          {"rewards": [number or null], "extras": {name: [...]}, "metrics": {name: number}}
    GET /health  {"reward": name, "version": ...}

Any other status comes with {"error": sentence}: 400 a wrong request, 401 a wrong token, 404 and 405
another path or method, 408 too slow a client, 413 too long a body, 500 the reward failed, 503 too
many are waiting. Answers are JSON in the strict sense: a NaN in `extras` becomes null.

The reward is called by one request at a time: rewards that users write need not be thread-safe.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rlprompt import __version__
from rlprompt.errors import InputError
from rlprompt.rewards.base import RESERVED_KEYWORDS
from rlprompt.rewards.runner import RewardRunner
from rlprompt.serving.http_server import Address, HttpServer, Limits
from rlprompt.serving.json_api import BearerToken, Endpoint, Refusal, answer, json_app, read_json
from rlprompt.types import Completion, Group, Message, Query

_ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class ServeOptions:
    """Where and for whom a reward is served."""

    host: str = "127.0.0.1"
    port: int = 8770
    """0 = any free one."""
    token: str | None = field(default=None, repr=False)
    """What requests must carry as `Authorization: Bearer TOKEN`; None asks for nothing."""
    max_body_bytes: int = 16_000_000
    max_waiting: int = 32
    """Requests that may wait for the reward before others are sent away with 503."""
    certificate: Path | None = None
    """PEM file with certificate and key; None serves plain HTTP."""
    limits: Limits = field(default_factory=Limits)
    """Deadlines for clients, and how many may be connected."""


class RewardServer(HttpServer):
    """Serves the one reward of a runner until `shutdown`.

    Args:
        runner: the rewards, of which the first is served.
        options: the address, the token and the limits.

    Raises:
        InputError: the address cannot be used, or the certificate cannot be read.
    """

    def __init__(self, runner: RewardRunner, options: ServeOptions) -> None:
        self.runner = runner
        self.reward_name = runner.settings[0].name
        self._options = options
        self._token = BearerToken(options.token)
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward")
        app = json_app(
            [Endpoint("POST", "/score", self._answer), Endpoint("GET", "/health", self._health)]
        )
        super().__init__(
            app, Address(options.host, options.port, options.certificate, options.limits)
        )

    @property
    def url(self) -> str:
        """What a recipe writes as `url`."""
        return f"{self.origin}/score"

    def close(self) -> None:
        """Free the address, and take no request any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        super().close()

    async def _health(self, request: Request) -> Response:
        return answer({"reward": self.reward_name, "version": __version__})

    async def _answer(self, request: Request) -> Response:
        self._token.check(request)
        body = await read_json(request, self._options.max_body_bytes)
        try:
            groups, step = parse_request(body)
        except InputError as error:
            raise Refusal(400, str(error)) from error
        if self._waiting >= self._options.max_waiting:
            raise Refusal(503, "too many requests are waiting; ask again", {"Retry-After": "1"})
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return answer(
                await loop.run_in_executor(self._thread, score, self.runner, groups, step)
            )
        finally:
            self._waiting -= 1


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
    if not isinstance(step, int) or isinstance(step, bool):
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
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise InputError("completion_ids holds something that is no list of integers; correct it")
    return Completion(tuple(ids), (0.0,) * len(ids), text, True)
