"""HTTP to one vLLM server: completions as streams of events, adapters, health.

What it answers is data: it is bounded, and no error of it is told to clients word for word, since
vLLM's sentences may repeat what it was sent, and that holds what a prompt has learned.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from rlprompt.endpoints.addresses import address_parts, is_loopback
from rlprompt.errors import InputError, shorten
from rlprompt.reading import json_text

logger = logging.getLogger(__name__)

KEY_VARIABLE = "VLLM_API_KEY"
"""vLLM's own variable for its key."""
_LONGEST_LINE = 8_000_000
_LONGEST_BODY = 8_000_000
_STALE = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
"""How a connection ends that the server has closed while it was idle."""
_AGAIN = "ask again"


@dataclass(frozen=True)
class VllmSettings:
    """Which vLLM server draws the answers."""

    url: str
    """Its address, without `/v1`."""
    key: str = field(default="", repr=False)
    """Its key; empty = it has none."""
    wait_seconds: float = 0.0
    """How long to wait for it at the start."""
    health_seconds: float = 2.0
    """Between two looks at whether it is there."""


class VllmError(Exception):
    """vLLM has not done what it was asked for."""

    def __init__(self, status: int, sentence: str, *, answered: int | None = None) -> None:
        """Keep what is told of it.

        Args:
            status: HTTP status of our own answer.
            sentence: sentence for clients, in which nothing of vLLM's stands.
            answered: HTTP status that vLLM has answered with; None = there was no answer.
        """
        super().__init__(sentence)
        self.status, self.sentence, self.answered = status, sentence, answered

    @property
    def is_lost(self) -> bool:
        """Whether the server could not be reached, or has gone."""
        return self.answered is None


class UpstreamModel(NamedTuple):
    """The base that a vLLM server serves."""

    name: str
    """What requests call it."""
    root: str
    """What it was loaded from."""
    max_positions: int | None
    """Its longest conversation; None = it does not say."""


def vllm_settings(url: str, wait_seconds: float = 0.0) -> VllmSettings:
    """The server at an address that a user gives; its key is that of `VLLM_API_KEY`.

    Args:
        url: address, with or without `/v1`.
        wait_seconds: seconds to wait for it at the start.

    Raises:
        InputError: it is no address, or other machines could read what is sent there.
    """
    parts = address_parts(url, "--vllm-url", KEY_VARIABLE)
    if parts.query or parts.fragment:
        raise InputError("--vllm-url holds more than an address; write http://127.0.0.1:PORT")
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise InputError(
            f"--vllm-url names {parts.hostname}, to which questions and learned prompts would go "
            "readable for others; let vLLM listen on 127.0.0.1, or use https"
        )
    address = url.rstrip("/").removesuffix("/v1").rstrip("/")
    return VllmSettings(address, os.environ.get(KEY_VARIABLE, "").strip(), wait_seconds)


class VllmClient:
    """Asks one server; used by one event loop."""

    def __init__(self, settings: VllmSettings) -> None:
        """Keep the address; nothing is asked yet.

        Args:
            settings: the server.
        """
        headers = {"Accept-Encoding": "identity"}
        if settings.key:
            headers["Authorization"] = f"Bearer {settings.key}"
        self._http = httpx.AsyncClient(
            base_url=settings.url,
            headers=headers,
            # Below the five seconds after which vLLM closes an idle connection.
            limits=httpx.Limits(max_keepalive_connections=64, keepalive_expiry=2.0),
            timeout=httpx.Timeout(30.0, connect=5.0, read=None, pool=None),
            trust_env=False,
            follow_redirects=False,
        )

    async def close(self) -> None:
        """End all connections."""
        await self._http.aclose()

    async def is_healthy(self) -> bool:
        """Whether it answers, and its engine runs."""
        try:
            got = await self._http.get("/health", timeout=5.0)
        except httpx.TransportError:
            return False
        return got.status_code == 200

    async def model(self) -> UpstreamModel:
        """The base that it serves.

        Raises:
            VllmError: it does not say.
        """
        told = await self._json("GET", "/v1/models", None)
        models = told.get("data") if isinstance(told, dict) else None
        for each in models if isinstance(models, list) else ():
            if (
                isinstance(each, dict)
                and isinstance(each.get("id"), str)
                and not each.get("parent")
            ):
                most = each.get("max_model_len")
                known = most if isinstance(most, int) and most > 0 else None
                return UpstreamModel(each["id"], str(each.get("root") or each["id"]), known)
        raise VllmError(502, "the vLLM server names no model", answered=200)

    async def complete(self, body: Mapping[str, Any]) -> Any:
        """The answer to a whole completion.

        Args:
            body: the body of `POST /v1/completions`.

        Raises:
            VllmError: there is none.
        """
        return await self._json("POST", "/v1/completions", body)

    async def load_adapter(self, name: str, folder: str) -> None:
        """Load a LoRA adapter.

        Args:
            name: its name there.
            folder: absolute path of its folder, which vLLM can read.

        Raises:
            VllmError: it has not been loaded.
        """
        body = {"lora_name": name, "lora_path": folder}
        await self._text("POST", "/v1/load_lora_adapter", body)

    async def unload_adapter(self, name: str) -> None:
        """Let an adapter go.

        Args:
            name: its name there.

        Raises:
            VllmError: it was not there.
        """
        await self._text("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    async def stream(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a completion that is told while it is drawn.

        Args:
            body: the body of `POST /v1/completions`, with `stream`.

        Raises:
            VllmError: it is refused, or broken off.
        """
        async with self._opened("POST", "/v1/completions", body) as response:
            async for line in _lines(response):
                if line == b"data: [DONE]":
                    return
                if line.startswith(b"data:"):
                    yield _event(line[5:])
        raise VllmError(502, f"the engine has broken off the answer; {_AGAIN}")

    async def _json(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        return _parsed(await self._text(method, path, body))

    async def _text(self, method: str, path: str, body: Mapping[str, Any] | None) -> bytes:
        async with self._opened(method, path, body) as response:
            return await _content(response, _LONGEST_BODY)

    @asynccontextmanager
    async def _opened(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> AsyncIterator[httpx.Response]:
        """An answer with status 200, whose body has not been read."""
        content = None if body is None else json.dumps(body).encode()
        headers = {} if content is None else {"Content-Type": "application/json"}
        request = self._http.build_request(method, path, content=content, headers=headers)
        try:
            try:
                response = await self._http.send(request, stream=True)
            except _STALE:
                response = await self._http.send(request, stream=True)
        except httpx.TransportError as error:
            logger.warning("vLLM cannot be reached: %s", shorten(repr(error), 200))
            raise VllmError(503, f"the engine cannot be reached; {_AGAIN}") from error
        try:
            if response.status_code != 200:
                raise await _refusal(path, response)
            yield response
        except httpx.TransportError as error:
            logger.warning("vLLM has broken off an answer: %s", shorten(repr(error), 200))
            raise VllmError(502, f"the engine has broken off the answer; {_AGAIN}") from error
        finally:
            await response.aclose()


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """The lines of a body, without their ends; a last line without one is left out."""
    held = b""
    async for part in response.aiter_raw():
        held += part
        *whole, held = held.split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r")
        if len(held) > _LONGEST_LINE:
            raise VllmError(502, f"the engine has answered with too long a line; {_AGAIN}")


async def _content(response: httpx.Response, most: int) -> bytes:
    content = b""
    async for part in response.aiter_raw():
        content += part
        if len(content) > most:
            raise VllmError(502, "the engine has answered with too much", answered=200)
    return content


def _event(data: bytes) -> dict[str, Any]:
    """An event of a stream.

    Raises:
        VllmError: it is none, or tells of an error.
    """
    event = _parsed(data)
    if not isinstance(event, dict):
        raise VllmError(502, "the engine has answered with no event", answered=200)
    if event.get("error"):
        logger.warning("vLLM has failed: %s", shorten(str(event["error"]), 200))
        raise VllmError(502, f"the engine has failed in the middle; {_AGAIN}", answered=200)
    return event


def _parsed(data: bytes) -> Any:
    try:
        return json_text.loads(data, surrogates=True, lenient=True)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VllmError(502, "the engine has answered with no JSON", answered=200) from error


async def _refusal(path: str, response: httpx.Response) -> VllmError:
    """What is told of an answer that is none; what vLLM says of it goes to the log, cut."""
    status = response.status_code
    said = (await _content(response, 65536)).decode("utf-8", "replace")
    logger.warning("vLLM has answered %s with %d: %s", path, status, shorten(said, 200))
    if status in (429, 503):
        return VllmError(
            status, f"the engine takes no more requests now; {_AGAIN}", answered=status
        )
    if status in (401, 403):
        sentence = (
            f"the engine refuses the key of this server; its operator has to set {KEY_VARIABLE}"
        )
        return VllmError(502, sentence, answered=status)
    if status >= 500:
        return VllmError(502, f"the engine has failed; {_AGAIN}", answered=status)
    return VllmError(502, "the engine refuses the request; see the server's log", answered=status)
