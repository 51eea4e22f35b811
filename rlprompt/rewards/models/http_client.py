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
import ipaddress
import json
import logging
import os
import random
import re
import ssl
from collections.abc import Coroutine, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, quote, urlsplit
from weakref import WeakKeyDictionary

from pydantic import Field

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
_PIECE = 8
"""Characters of a secret that are left out wherever they follow each other."""
_HIDDEN = "[secret]"

T = TypeVar("T")
VARIABLE = re.compile(r"\$\{(\w+)\}")
"""How a `url` names an environment variable."""


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
        self._url = _with_variables(settings.url)
        parts = _parts(self._url)
        assert parts.hostname is not None
        self._local = _is_loopback(parts.hostname)
        self._direct = self._local or _is_own_server(parts.hostname)
        # As written: what an environment variable stands for may be secret in the path too.
        self.shown = re.split(r"[?#]", settings.url)[0]
        """The address without what follows the path, which may be secret."""
        if settings.token_env is None and settings.token_header != "Authorization":
            raise InputError("token_header has no effect without token_env; set it or remove both")
        self._check_token(parts.scheme)
        values = [value for _, value in parse_qsl(parts.query)] + [parts.query, parts.fragment]
        values += [os.environ[name] for name in VARIABLE.findall(settings.url)]
        self._secrets = [self._token(), *(value for value in values if len(value) > 3)]
        self._trust()

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
            if isinstance(error.__cause__, ssl.SSLError) or "CERTIFICATE_VERIFY" in str(error):
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
                verify=self._trust(),
                trust_env=not self._direct,
                timeout=None,
                follow_redirects=False,
            )
        return pools[key]

    def _trust(self) -> ssl.SSLContext:
        """The authorities that may have signed the server's certificate.

        Raises:
            InputError: the file of the recipe's own cannot be read or holds none.
        """
        name = self._settings.ca_file
        if name is None:
            return ssl.create_default_context()
        if not Path(name).exists():
            raise InputError(f"ca_file {name!r} does not exist; correct the path")
        if not Path(name).is_file():
            raise InputError(f"ca_file {name!r} is no file; name the PEM file")
        try:
            return ssl.create_default_context(cafile=name)
        except (OSError, ValueError) as error:
            raise InputError(
                f"ca_file {name!r} cannot be read as certificates ({describe_error(error)}); give "
                f"a PEM file of the authority that signed the server's certificate"
            ) from error

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


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """A text in which no secret stands, nor a longer piece of one.

    Args:
        text: text of a server, which may repeat what it was sent.
        secrets: texts that nobody may read; an empty one is none.
    """
    for secret in filter(None, secrets):
        written = {secret, quote(secret, safe=""), json.dumps(secret)[1:-1]}
        for form in sorted(written, key=len, reverse=True):
            text = text.replace(form, _HIDDEN)
        text = _without_pieces(text, secret)
    return text


def _without_pieces(text: str, secret: str) -> str:
    """The text without the runs of characters that stand in a secret in the same order."""
    hidden = bytearray(len(text))
    for start in range(len(secret) - _PIECE + 1):
        piece = secret[start : start + _PIECE]
        at = text.find(piece)
        while at >= 0:
            hidden[at : at + _PIECE] = b"\1" * _PIECE
            at = text.find(piece, at + 1)
    shown = []
    for at, character in enumerate(text):
        if not hidden[at]:
            shown.append(character)
        elif at == 0 or not hidden[at - 1]:
            shown.append(_HIDDEN)
    return "".join(shown)


def _parts(url: str) -> SplitResult:
    """The parts of an address that can be asked.

    Raises:
        InputError: it is none, or holds a user name or a password.
    """
    import httpx

    known = re.sub(r"//[^/?#]*@", "//", re.split(r"[?#]", url)[0])  # what may be shown of it
    advice = "write http(s)://host[:port]/path"
    if not url.isprintable() or " " in url:
        raise InputError(f"url {known!r} holds blanks or line breaks; {advice}")
    try:
        parts = urlsplit(url)
        port = parts.port
        httpx.URL(url)
        (parts.hostname or "").encode("idna")
    except (ValueError, httpx.InvalidURL) as error:
        raise InputError(f"url {known!r} is no address ({shorten(str(error))}); {advice}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise InputError(f"url {known!r} is no address; {advice}")
    if parts.username or parts.password:
        raise InputError("the url holds a user name or password; use token_env instead")
    return parts


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


def _is_loopback(host: str) -> bool:
    if host.rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_own_server(host: str) -> bool:
    """Whether a Slurm job has started a server there, beside this run (see `slurm/server.sh`)."""
    return "SLURM_JOB_ID" in os.environ and host == os.environ.get("SERVER", "").lower()


def _with_variables(url: str) -> str:
    """A `url` with the environment's values in it."""

    def value(found: re.Match[str]) -> str:
        name = found[1]
        given = os.environ.get(name, "").strip()
        if not given:
            raise InputError(f"the environment variable {name} (url) is not set; set it")
        return given

    return VARIABLE.sub(value, url)
