"""POST JSON, get JSON: with retries, deadlines, limits on sizes, and TLS that is always verified.

The token is read from the environment, so that it is in no recipe, log or artifact. It is not sent
over plain HTTP to another machine unless the recipe says so, and redirects are not followed: they
would carry it elsewhere. A server may say it back: what is quoted of an answer has neither the
token nor what the address holds behind its path.

A proxy of the environment is asked, but not for what runs on this machine, nor for the server that
a Slurm job has started beside its training (`{server}`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
from collections.abc import Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl
from weakref import WeakKeyDictionary

from pydantic import Field

from rlprompt.endpoints.addresses import (
    VARIABLE,
    address_parts,
    is_certificate_error,
    is_loopback,
    is_own_server,
    trusted,
    with_variables,
    without_secrets,
)
from rlprompt.errors import InputError, describe_error, first_error, shorten
from rlprompt.rewards.base import ReportedError
from rlprompt.settings import Settings

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 30.0
_MEGABYTE = 1_000_000
_QUOTED = 4096
"""Of an answer, the characters of which a sentence may quote some."""

T = TypeVar("T")


class HttpSettings(Settings):
    """How a server is reached."""

    url: str
    """Address of the server, http:// or https://; `${NAME}` in it is that environment variable, for
    what is secret: a recipe is copied into artifacts."""
    request_timeout: float = Field(default=30.0, gt=0)
    """Seconds that one attempt may take; the reward's `timeout` bounds all of them together."""
    retries: int = Field(default=3, ge=0, le=20)
    """Further attempts after a lost connection, a timeout or status 408, 425, 429, 500, 502-504."""
    backoff: float = Field(default=0.5, gt=0)
    """Seconds before the first further attempt, doubled each time up to 30, times a random number
    in [0.5, 1]; a server's Retry-After wins."""
    concurrency: int = Field(default=8, ge=1, le=256)
    """Requests under way at the same time."""
    token_env: str | None = None
    """Environment variable with a token; sent as `Authorization: Bearer TOKEN`."""
    token_header: str = "Authorization"
    """Header that carries the token; any other than Authorization holds the token alone."""
    plain_http_token: bool = False
    """Allow the token over http:// to another machine, where the network can read it."""
    ca_file: str | None = None
    """PEM file of the authority that signed the server's certificate, for one of your own."""
    max_request_mb: float = Field(default=16.0, gt=0)
    """Largest body that is sent, in MB."""
    max_response_mb: float = Field(default=16.0, gt=0)
    """Largest body that is read, in MB."""


class JsonClient:
    """Sends JSON to the server of some settings.

    Raises:
        InputError: the address is none, the token's variable is not set, the token would go over
            plain HTTP, or the certificate file cannot be read.
    """

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        self._url = with_variables(settings.url, "url")
        parts = address_parts(self._url, "url", "token_env")
        assert parts.hostname is not None
        self._local = is_loopback(parts.hostname)
        self._direct = self._local or is_own_server(parts.hostname)
        # As written: what an environment variable stands for may be secret in the path too.
        self.shown = re.split(r"[?#]", settings.url)[0]
        """The address without what follows the path, which may be secret."""
        if settings.token_env is None and settings.token_header != "Authorization":
            raise InputError("token_header has no effect without token_env; set it or remove both")
        self._check_token(parts.scheme)
        values = [value for _, value in parse_qsl(parts.query)] + [parts.query, parts.fragment]
        values += [os.environ[name] for name in VARIABLE.findall(settings.url)]
        self._secrets = [self._token(), *(value for value in values if len(value) > 3)]
        trusted(settings.ca_file)

    def quoted(self, answer: Any) -> str:
        """What a server has said, for a sentence: shortened, and without secrets."""
        text = answer if isinstance(answer, str) else repr(answer)
        return shorten(without_secrets(text[:_QUOTED], self._secrets), 200)

    async def post(self, payload: Mapping[str, Any], path: str = "") -> Any:
        """Send `payload` to the url followed by `path`; returns the parsed answer.

        Raises:
            ReportedError: no usable answer came, after the retries that the settings allow.
        """
        try:
            body = json.dumps(payload, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"the batch cannot be sent to {self.shown} as JSON ({describe_error(error)}); "
                f"leave out the column or key that holds such values"
            ) from error
        limit = self._settings.max_request_mb * _MEGABYTE
        if len(body) > limit:
            raise ReportedError(
                f"would send {len(body) / _MEGABYTE:.1f} MB to {self.shown}",
                f"set batch_size, or raise max_request_mb ({self._settings.max_request_mb:g})",
            )
        attempt = 0
        while True:
            try:
                return await self._attempt(body, path)
            except _Retryable as problem:
                if attempt == self._settings.retries:
                    tries = f", {attempt + 1} times" if attempt else ""
                    told = f"got no answer from {self.shown}: {problem}{tries}"
                    raise ReportedError(told, "see what ails the server") from problem
                wait = min(_LONGEST_WAIT, self._settings.backoff * 2.0**attempt)
                wait = wait * _jitter() if problem.wait is None else problem.wait
                attempt += 1
                logger.warning(
                    "%s: %s; attempt %d follows in %.1f s", self.shown, problem, attempt + 1, wait
                )
                await asyncio.sleep(wait)

    async def _attempt(self, body: bytes, path: str) -> Any:
        import httpx

        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers |= self._authorization()
        address, mark, query = self._url.partition("?")
        url = (address.rstrip("/") + path if path else address) + mark + query
        try:
            async with (
                asyncio.timeout(self._settings.request_timeout),
                self._http().stream("POST", url, content=body, headers=headers) as answer,
            ):
                text = await self._read(answer)
                status, retry_after = answer.status_code, answer.headers.get("Retry-After")
        except TimeoutError:
            raise _Retryable(f"nothing within {self._settings.request_timeout:g} s") from None
        except httpx.TransportError as error:
            reason = self.quoted(str(error)).rstrip(".") or type(error).__name__
            if is_certificate_error(error):
                raise ReportedError(
                    f"cannot verify the certificate of {self.shown} ({reason})",
                    "give ca_file for a certificate of your own",
                ) from error
            raise _Retryable(reason) from error
        except ReportedError:
            raise
        except Exception as error:  # what a client makes of a proxy, a host name or an answer
            raise ReportedError(
                f"cannot ask {self.shown} ({self.quoted(describe_error(error))})",
                "check url and ca_file, and the proxy that the environment names",
            ) from error
        return self._parsed(status, text, retry_after)

    def _parsed(self, status: int, text: bytes, retry_after: str | None) -> Any:
        said = self.quoted(text[:_QUOTED].decode(errors="replace"))
        if status in _RETRIED:
            raise _Retryable(f"status {status} ({said})", _seconds(retry_after))
        if status in (401, 403):
            raise ReportedError(
                f"was refused by {self.shown} with status {status} ({said})",
                f"check the token in {self._settings.token_env or 'token_env, which is not set'}",
            )
        if status != 200:
            raise ReportedError(f"got status {status} from {self.shown} ({said})", "check the url")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ReportedError(
                f"got an answer from {self.shown} that is not JSON ({said})",
                "check that the url is that of a reward server",
            ) from error

    async def _read(self, answer: httpx.Response) -> bytes:
        limit = self._settings.max_response_mb * _MEGABYTE
        parts, size = [], 0
        async for part in answer.aiter_raw():
            size += len(part)
            if size > limit:
                raise ReportedError(
                    f"got more than {self._settings.max_response_mb:g} MB from {self.shown}",
                    "raise max_response_mb if that is right",
                )
            parts.append(part)
        return b"".join(parts)

    def _http(self) -> httpx.AsyncClient:
        """The connection pool of the running loop; pools belong to the loop they were opened in."""
        import httpx

        pools = _POOLS.setdefault(asyncio.get_running_loop(), {})
        key = (self._settings.ca_file, self._direct)
        if key not in pools:
            pools[key] = httpx.AsyncClient(
                verify=trusted(self._settings.ca_file),
                trust_env=not self._direct,
                timeout=None,
                follow_redirects=False,
            )
        return pools[key]

    def _token(self) -> str:
        variable = self._settings.token_env
        return "" if variable is None else os.environ.get(variable, "").strip()

    def _authorization(self) -> dict[str, str]:
        if self._settings.token_env is None:
            return {}
        header, token = self._settings.token_header, self._token()
        return {header: f"Bearer {token}" if header == "Authorization" else token}

    def _check_token(self, scheme: str) -> None:
        variable = self._settings.token_env
        if variable is None:
            return
        token = self._token()
        if not token:
            raise InputError(f"the environment variable {variable} (token_env) is not set; set it")
        if not (token.isascii() and token.isprintable()):
            raise InputError(f"the token in {variable} holds characters no header may; mend it")
        header = self._settings.token_header
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", header):
            raise InputError(f"token_header {header!r} is no name of a header; correct it")
        if scheme == "http" and not self._local and not self._settings.plain_http_token:
            raise InputError(
                f"the token in {variable} would go to {self.shown} unencrypted; use https://, or "
                f"set plain_http_token: true on a network that you trust"
            )


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all; the first that fails cancels the others, and its own exception is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None
    return [task.result() for task in tasks]


class _Retryable(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


_POOLS: WeakKeyDictionary[
    asyncio.AbstractEventLoop, dict[tuple[str | None, bool], httpx.AsyncClient]
] = WeakKeyDictionary()
_RANDOM = random.Random()


def _jitter() -> float:
    return _RANDOM.uniform(0.5, 1.0)  # not the global generator: a run must draw the same numbers


def _seconds(retry_after: str | None) -> float | None:
    if retry_after is None or not retry_after.strip().isdigit():
        return None
    return min(_LONGEST_WAIT, float(retry_after))
