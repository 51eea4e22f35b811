"""Sends JSON requests to servers that do the same work, many at once, and tries again.

Unlike `client`, it knows neither chat nor money: a request is a path and a body, an answer is what
the JSON says. Requests run in a thread of its own with an event loop, and the caller's thread hears
of each answer as it comes: where the caller fails or is stopped, what is under way is broken off,
which tells servers to stop working on it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
from rlprompt.endpoints.pace import backoff, retry_after
from rlprompt.errors import InputError, describe_error, shorten
from rlprompt.reading import json_text

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

_AGAIN = frozenset({408, 409, 425, 429})
_MOST_BYTES = 256_000_000
"""Of an answer."""
_QUOTED = 4096
"""Of an answer, the characters of which a sentence may quote some."""


@dataclass(frozen=True)
class ServerAccess:
    """How servers are reached."""

    urls: tuple[str, ...]
    """Addresses up to the version, as a recipe has them."""
    api_key: str | None = None
    """`${NAME}` of the variable with the key; None = none is sent."""
    plain_http_key: bool = False
    """Whether the key may go over plain HTTP to another machine."""
    ca_file: str | None = None
    """PEM file of an authority of one's own."""
    concurrency: int = 64
    """Requests under way at the same time."""
    request_timeout: float = 600.0
    """Seconds that one attempt may take."""
    retries: int = 6
    """Further attempts after one that failed in a way that may pass."""
    backoff: float = 0.5
    """Seconds before the first of them."""


@dataclass(frozen=True)
class Call:
    """One request."""

    path: str
    """Behind the server's address, with its slash."""
    body: Mapping[str, Any] | None = None
    """What is posted as JSON; None = the path is read with GET."""
    server: int = 0
    """Which server is asked first."""
    may_move: bool = False
    """Whether a further attempt may go to the next server."""
    is_text: bool = False
    """Whether the answer is a text and no JSON."""


class StatusError(Exception):
    """A server has refused a request, and would again."""

    def __init__(self, status: int, said: str, server: str) -> None:
        """Keep what a sentence needs.

        Args:
            status: HTTP status.
            said: beginning of the answer, without secrets.
            server: address as the recipe has it.
        """
        super().__init__(f"{server} answers with status {status} ({said})")
        self.status = status
        self.said = said
        self.server = server


class _AgainError(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


@dataclass
class _Running:
    """One call of `ask` while it goes on."""

    heard: queue.SimpleQueue[tuple[int, Any] | BaseException | None]
    loop: asyncio.AbstractEventLoop | None = None
    task: asyncio.Task[None] | None = None
    started: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        self.started.wait()
        if self.loop is not None and self.task is not None:
            with suppress(RuntimeError):  # it has just ended
                self.loop.call_soon_threadsafe(self.task.cancel)


class JsonClient:
    """Asks some servers; see the module."""

    def __init__(self, access: ServerAccess, where: str = "engine") -> None:
        """Check what can be checked before anything is sent.

        Args:
            access: how the servers are reached.
            where: section of the recipe that it is from, for error messages.

        Raises:
            InputError: an address is none, a variable is not set, the key would go over plain HTTP,
                or the certificate file cannot be read.
        """
        self.access = access
        self._where = where
        self._chance = random.Random()  # not the global one: a run must draw the same numbers
        self.shown = tuple(url.rstrip("/") for url in access.urls)
        """The addresses as the recipe has them, without the values of variables."""
        self._urls: list[str] = []
        self._direct: list[bool] = []
        open_to: str | None = None
        local = []
        for place, url in enumerate(access.urls):
            key = f"{where}.urls[{place}]"
            base = with_variables(url, key).rstrip("/")
            parts = address_parts(base, key, f"{where}.api_key")
            assert parts.hostname is not None
            if parts.query or parts.fragment:
                raise InputError(
                    f"{key} holds something behind the path; write the address up to the version, "
                    "such as http://host:8000/v1"
                )
            local.append(is_loopback(parts.hostname))
            self._direct.append(local[-1] or is_own_server(parts.hostname))
            self._urls.append(base)
            if parts.scheme == "http" and not local[-1]:
                open_to = open_to or self.shown[place]
        self.is_local = all(local)
        """Whether every server is on this machine."""
        self._key = self._read_key(open_to)
        names = [name for url in access.urls for name in VARIABLE.findall(url)]
        values = [with_variables(f"${{{name}}}", where) for name in names]
        self._secrets = [self._key, *(value for value in values if len(value) > 3)]
        self._trust = trusted(access.ca_file)

    def _read_key(self, open_to: str | None) -> str:
        """The key that requests carry; empty without one."""
        if self.access.api_key is None:
            return ""
        name = VARIABLE.findall(self.access.api_key)[0]
        key = with_variables(self.access.api_key, f"{self._where}.api_key")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise InputError(
                f"the key in {name} ({self._where}.api_key) holds characters that no header may; "
                "mend it"
            )
        if open_to is not None and not self.access.plain_http_key:
            raise InputError(
                f"the key in {name} would go to {open_to} unencrypted; use https://, or set "
                f"{self._where}.plain_http_key: true on a network that you trust"
            )
        return key

    def ask(
        self,
        calls: Sequence[Call],
        heard: Callable[[int, Any], None] | None = None,
        retries: int | None = None,
    ) -> list[Any]:
        """What the answers hold, in the order of the calls.

        Args:
            calls: what is asked.
            heard: function of the place of a call and its answer, called here as answers come; it
                may raise to break off the rest.
            retries: further attempts in place of the settings'.

        Raises:
            InputError: a server cannot be reached, or gives nothing usable.
            StatusError: it refuses a request.
        """
        answers: list[Any] = [None] * len(calls)
        running = _Running(queue.SimpleQueue())
        thread = threading.Thread(
            target=self._run, args=(running, calls, retries), name="json-client", daemon=True
        )
        thread.start()
        try:
            while (item := running.heard.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                place, answer = item
                answers[place] = answer
                if heard is not None:
                    heard(place, answer)
        except BaseException:
            running.stop()
            raise
        finally:
            thread.join()
        return answers

    def _run(self, running: _Running, calls: Sequence[Call], retries: int | None) -> None:
        async def work() -> None:
            running.loop = asyncio.get_running_loop()
            running.task = asyncio.current_task()
            running.started.set()
            await self._all(calls, retries, running)

        try:
            asyncio.run(work())
        except asyncio.CancelledError:
            running.heard.put(None)
        except BaseExceptionGroup as group:
            running.heard.put(group.exceptions[0])
        except BaseException as error:
            running.heard.put(error)
        else:
            running.heard.put(None)
        finally:
            running.started.set()

    async def _all(self, calls: Sequence[Call], retries: int | None, running: _Running) -> None:
        import httpx

        gate = asyncio.Semaphore(self.access.concurrency)
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(
                    httpx.AsyncClient(
                        verify=self._trust,
                        trust_env=not direct,
                        timeout=None,
                        follow_redirects=False,
                        limits=httpx.Limits(max_connections=None),
                    )
                )
                for direct in self._direct
            ]

            async def one(place: int, call: Call) -> None:
                async with gate:
                    answer = await self._attempts(clients, call, retries)
                running.heard.put((place, answer))

            async with asyncio.TaskGroup() as group:
                for place, call in enumerate(calls):
                    group.create_task(one(place, call))

    async def _attempts(
        self, clients: Sequence[httpx.AsyncClient], call: Call, retries: int | None
    ) -> Any:
        most = self.access.retries if retries is None else retries
        body = None if call.body is None else json.dumps(call.body, allow_nan=False).encode()
        failed = 0
        while True:
            moved = failed if call.may_move else 0
            server = (call.server + moved) % len(self._urls)
            try:
                return await self._attempt(clients[server], server, call, body)
            except _AgainError as problem:
                failed += 1
                told = f"{self._where}: {self.shown[server]}: {problem}"
                if failed > most:
                    times = f" ({failed} attempts)" if failed > 1 else ""
                    raise InputError(
                        f"{told}{times}; see whether the server runs and what its log says"
                    ) from problem
                wait = problem.wait
                if wait is None:
                    wait = backoff(failed, self.access.backoff, self._chance)
                logger.warning("%s; a further attempt follows in %.1f s", told, wait)
                await asyncio.sleep(min(wait, self.access.request_timeout))

    async def _attempt(
        self, http: httpx.AsyncClient, server: int, call: Call, body: bytes | None
    ) -> Any:
        """One request, and the JSON of its answer; of a text, the text."""
        import httpx

        seconds = self.access.request_timeout
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        method = "GET" if body is None else "POST"
        url = f"{self._urls[server]}{call.path}"
        try:
            async with (
                asyncio.timeout(seconds),
                http.stream(method, url, content=body, headers=headers) as response,
            ):
                content = await self._read(response)
                status, after = response.status_code, response.headers.get("Retry-After")
        except TimeoutError:
            raise _AgainError(
                f"nothing within {seconds:g} s ({self._where}.request_timeout)"
            ) from None
        except httpx.TransportError as error:
            reason = self._quoted(str(error)).rstrip(".") or type(error).__name__
            if is_certificate_error(error):
                raise InputError(
                    f"{self._where}: the certificate of {self.shown[server]} cannot be verified "
                    f"({reason}); give {self._where}.ca_file for a certificate of your own"
                ) from error
            raise _AgainError(reason) from error
        except (_AgainError, InputError):
            raise
        except Exception as error:  # what a client makes of a proxy, a host name or an answer
            raise InputError(
                f"{self._where}: {self.shown[server]} cannot be asked "
                f"({self._quoted(describe_error(error))}); check urls and ca_file, and the proxy "
                "that the environment names"
            ) from error
        if status != 200:
            self._refuse(status, content, after, server)
        if call.is_text:
            return content.decode(errors="replace")
        try:
            return json_text.loads(content, surrogates=True, lenient=True)
        except ValueError as error:
            quoted = self._quoted(content[:_QUOTED].decode(errors="replace"))
            raise _AgainError(f"an answer that is not JSON ({error}: {quoted})") from error

    async def _read(self, response: httpx.Response) -> bytes:
        parts, size = [], 0
        async for part in response.aiter_raw():
            size += len(part)
            if size > _MOST_BYTES:
                raise InputError(
                    f"{self._where}: an answer has more than {_MOST_BYTES // 10**6} MB; check that "
                    "urls lead to the server that is meant"
                )
            parts.append(part)
        return b"".join(parts)

    def _refuse(self, status: int, content: bytes, after: str | None, server: int) -> None:
        """Raise what a status other than 200 means."""
        said = self._quoted(_message(content[:_QUOTED].decode(errors="replace")))
        if status in _AGAIN or status >= 500:
            raise _AgainError(f"status {status} ({said})", retry_after(after, time.time()))
        told = f"{self._where}: {self.shown[server]} answers with status {status} ({said})"
        if status in (401, 403):
            key = self.access.api_key
            name = "which is not set" if key is None else key
            raise InputError(f"{told}; check the key of {self._where}.api_key ({name})")
        if 300 <= status < 400:
            raise InputError(
                f"{told}, and redirects are not followed, since they would carry the key "
                f"elsewhere; write the address that it leads to into {self._where}.urls"
            )
        raise StatusError(status, said, self.shown[server])

    def _quoted(self, text: str) -> str:
        """What a server has said, for a sentence: shortened, and without secrets."""
        return shorten(without_secrets(text[:_QUOTED], self._secrets), 240)


def _message(text: str) -> str:
    """The message of an error as OpenAI's protocol writes it, else the text."""
    try:
        said = json.loads(text)
        message = said["error"]["message"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return text
    return message if isinstance(message, str) else text
