"""Asks a model behind an OpenAI-compatible server, in parallel, and pays for nothing twice.

Questions begin in their order, as far as concurrency, rate limits and the budget let them. An
attempt that fails in a way that may pass is made again; what the user has to mend is one sentence
at once. Redirects are not followed: they would carry the key elsewhere.

The work is done in a thread of its own with an event loop: a caller may have a loop already, as
notebooks do, and a stop signal, which comes to the main thread, must not cut off requests that are
paid for. It keeps new ones from beginning and waits for those under way.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
from rlprompt.endpoints.answers import (
    Answer,
    Question,
    UnusableError,
    Usage,
    read_answer,
    read_usage,
)
from rlprompt.endpoints.ledger import Amount, BudgetSpentError, Ledger
from rlprompt.endpoints.pace import Clock, Pace, backoff, retry_after
from rlprompt.endpoints.settings import EndpointSettings
from rlprompt.errors import InputError, describe_error, shorten
from rlprompt.reading import json_text

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

_AGAIN = frozenset({408, 409, 425, 429})
_MEGABYTE = 1_000_000
_QUOTED = 4096
"""Of an answer, the characters of which a sentence may quote some."""


class _AgainError(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(
        self,
        why: str,
        *,
        wait: float | None = None,
        is_free: bool = False,
        is_final: bool = False,
        paid: Usage | None = None,
    ) -> None:
        super().__init__(why)
        self.wait = wait
        """Seconds that the server asks to wait."""
        self.is_free = is_free
        """Whether nobody bills it."""
        self.is_final = is_final
        """Whether it will not pass after all, though it may be billed."""
        self.usage = paid
        """What the server says that it used."""


class _StoppedError(Exception):
    """The caller wants no more."""


@dataclass
class _Work:
    """One call of `ask` while it goes on; everything belongs to the loop's thread."""

    http: httpx.AsyncClient
    gate: asyncio.Semaphore
    settled: asyncio.Condition
    stop: asyncio.Event
    failure: BaseException | None = None


class EndpointClient:
    """Asks one model; several clients of a run share its ledger."""

    def __init__(
        self,
        settings: EndpointSettings,
        ledger: Ledger | None = None,
        clock: Clock | None = None,
        where: str = "engine",
    ) -> None:
        """Check what can be checked before anything is sent.

        Args:
            settings: how the server is reached.
            ledger: what was paid for, and what may be spent; None = in memory, without a budget.
            clock: time as it passes; a test gives one of its own.
            where: section of the recipe that the settings are from, for error messages.

        Raises:
            InputError: the address is none, a variable is not set, the key would go over plain
                HTTP, or the certificate file cannot be read.
        """
        self.settings = settings
        self.ledger = ledger or Ledger()
        self._clock = clock or Clock()
        self._where = where
        self._pace = Pace(settings.requests_per_minute, settings.tokens_per_minute)
        self._chance = random.Random()  # not the global one: a run must draw the same numbers
        base = with_variables(settings.base_url, f"{where}.base_url").rstrip("/")
        parts = address_parts(base, f"{where}.base_url", f"{where}.api_key")
        assert parts.hostname is not None
        if parts.query or parts.fragment:
            raise InputError(
                f"{where}.base_url holds something behind the path; write the address up to the "
                "version, such as https://host/v1"
            )
        self._url = f"{base}/chat/completions"
        self.shown = settings.base_url.rstrip("/")
        """The address as the recipe has it, without the values of variables."""
        local = is_loopback(parts.hostname)
        self._direct = local or is_own_server(parts.hostname)
        self._key = self._read_key(parts.scheme == "http" and not local)
        named = [os.environ[name].strip() for name in VARIABLE.findall(settings.base_url)]
        self._secrets = [self._key, *(value for value in named if len(value) > 3)]
        self._trust = trusted(settings.ca_file)

    def _read_key(self, is_open: bool) -> str:
        """The key that requests carry; empty without one."""
        settings, where = self.settings, self._where
        if settings.api_key is None:
            return ""
        name = VARIABLE.findall(settings.api_key)[0]
        key = with_variables(settings.api_key, f"{where}.api_key")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise InputError(
                f"the key in {name} ({where}.api_key) holds characters that no header may; mend it"
            )
        if is_open and not settings.plain_http_key:
            raise InputError(
                f"the key in {name} would go to {self.shown} unencrypted; use https://, or set "
                f"{where}.plain_http_key: true on a network that you trust"
            )
        return key

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers, in order; those that were paid for before are not asked for again.

        Args:
            questions: what is asked; equal ones are sent once.

        Raises:
            InputError: no usable answer can be had; what came meanwhile is in the ledger.
            BudgetSpentError: the next request may not fit into the budget.
        """
        self.ledger.open()
        wanted = {each.key: each for each in questions}
        missing = [each for key, each in wanted.items() if self.ledger.answer(key) is None]
        if missing:
            self._in_thread(missing)
        answers = [self.ledger.answer(each.key) for each in questions]
        return [each for each in answers if each is not None]

    def _in_thread(self, missing: Sequence[Question]) -> None:
        """Ask in a thread; an exception of the caller's own waits for what is under way."""
        done, failures = threading.Event(), list[BaseException]()
        begun: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

        async def work() -> None:
            stop = asyncio.Event()
            begun.append((asyncio.get_running_loop(), stop))
            await self._all(missing, stop)

        def target() -> None:
            try:
                asyncio.run(work())
            except BaseException as error:
                failures.append(error)
            finally:
                done.set()

        threading.Thread(target=target, name="endpoint", daemon=True).start()
        try:
            done.wait()
        except BaseException:
            for loop, stop in begun:
                with suppress(RuntimeError):  # it has just ended
                    loop.call_soon_threadsafe(stop.set)
            done.wait()
            raise
        if failures:
            raise failures[0]

    async def _all(self, missing: Sequence[Question], stop: asyncio.Event) -> None:
        """Begin the questions in their order, and wait until all that began have ended."""
        import httpx

        client = httpx.AsyncClient(
            verify=self._trust,
            trust_env=not self._direct,
            timeout=None,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=None),
        )
        async with client as http:
            gate = asyncio.Semaphore(self.settings.concurrency)
            work = _Work(http, gate, asyncio.Condition(), stop)
            tasks = [
                asyncio.create_task(self._finished(work, question, attempt))
                async for question, attempt in self._beginnings(work, missing)
            ]
            await asyncio.gather(*tasks)
        if work.failure is not None:
            raise work.failure

    async def _beginnings(
        self, work: _Work, missing: Sequence[Question]
    ) -> AsyncIterator[tuple[Question, int]]:
        """Each question with its first attempt, as soon as it may begin."""
        for question in missing:
            await work.gate.acquire()
            try:
                attempt = await self._begin(work, question)
            except (_StoppedError, BudgetSpentError, InputError, OSError) as error:
                work.failure = work.failure or error
                work.gate.release()
                return
            yield question, attempt

    async def _finished(self, work: _Work, question: Question, attempt: int) -> None:
        """Make attempts until one is answered; a failure stops what has not begun."""
        try:
            await self._attempts(work, question, attempt)
        except Exception as error:
            work.failure = work.failure or error
            work.stop.set()
        finally:
            work.gate.release()

    async def _attempts(self, work: _Work, question: Question, attempt: int) -> None:
        settings, clock = self.settings, self._clock
        body = json.dumps(question.body, allow_nan=False).encode()
        end = clock.now() + settings.deadline
        failed = 0
        while True:
            try:
                answer = await self._attempt(work.http, body, question)
            except _AgainError as problem:
                await self._settle(work, attempt, problem)
                failed += 1
                await self._wait_after(work, problem, failed, end)
                attempt = await self._begin(work, question)
                continue
            except InputError:
                self.ledger.free(attempt)
                await self._notify(work)
                raise
            paid = None if answer.usage is None else self._cost(answer.usage)
            self._warn_if_over(question, answer.usage)
            self.ledger.answered(attempt, question.key, paid, answer)
            await self._notify(work)
            return

    async def _settle(self, work: _Work, attempt: int, problem: _AgainError) -> None:
        """Note how an attempt ended that brought nothing."""
        if problem.is_free:
            self.ledger.free(attempt)
        else:
            paid = None if problem.usage is None else self._cost(problem.usage)
            self.ledger.failed(attempt, str(problem), paid)
        await self._notify(work)

    async def _wait_after(self, work: _Work, problem: _AgainError, failed: int, end: float) -> None:
        """Wait before a further attempt, unless there is to be none."""
        settings, clock = self.settings, self._clock
        times = f", {failed} times" if failed > 1 else ""
        told = f"{self._where}: no answer from {self.shown}: {problem}{times}"
        if failed > settings.retries or problem.is_final:
            raise InputError(
                f"{told}; see what ails the server and go on with --resume, which pays for nothing "
                "twice"
            )
        wait = backoff(failed, settings.backoff, self._chance)
        if problem.wait is not None:
            wait = problem.wait
            self._pace.hold(clock.now() + wait)
        if clock.now() + wait >= end:
            raise InputError(
                f"{told}, and {wait:.0f} s more are longer than {self._where}.deadline "
                f"({settings.deadline:g} s); raise it, or go on later with --resume"
            )
        logger.warning("%s; a further attempt follows in %.1f s", told, wait)
        await self._pause(work, wait)

    async def _begin(self, work: _Work, question: Question) -> int:
        """Note that an attempt begins, as soon as rate limits and budget let it.

        Raises:
            BudgetSpentError: it may not fit, and nothing is under way that could make room.
            _StoppedError: nothing is to begin any more.
        """
        most = self._most(question)
        async with work.settled:
            while not self.ledger.fits(most):
                if not self.ledger.under_way:
                    raise BudgetSpentError(self.ledger.over())
                await work.settled.wait()
        while wait := self._pace.wait(self._clock.now(), most.tokens):
            await self._pause(work, wait)
        if work.stop.is_set():
            raise _StoppedError("stopped")
        if not self.ledger.fits(most):  # another one has begun during the wait
            return await self._begin(work, question)
        self._pace.begin(self._clock.now(), most.tokens)
        return self.ledger.begin(question.key, most)

    async def _notify(self, work: _Work) -> None:
        async with work.settled:
            work.settled.notify_all()

    async def _pause(self, work: _Work, seconds: float) -> None:
        """Wait, but not longer than until a stop.

        Raises:
            _StoppedError: there was one.
        """
        waits = [
            asyncio.ensure_future(self._clock.sleep(seconds)),
            asyncio.ensure_future(work.stop.wait()),
        ]
        _, rest = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for each in rest:
            each.cancel()
        if work.stop.is_set():
            raise _StoppedError("stopped")

    def _most(self, question: Question) -> Amount:
        """What a request can cost at most."""
        prompt = question.text_bytes + self.settings.template_tokens
        return self._cost(Usage(prompt, question.max_tokens * question.choices))

    def _cost(self, usage: Usage) -> Amount:
        price_in, price_out = self.settings.prices
        return Amount(usage.tokens, price_in * usage.prompt + price_out * usage.completion)

    def _warn_if_over(self, question: Question, usage: Usage | None) -> None:
        most = self._most(question)
        if usage is not None and usage.tokens > most.tokens:
            logger.warning(
                "%s says that a request took %d tokens, which could be %d at most: a budget may be "
                "exceeded; raise %s.template_tokens, or see why max_tokens is not kept",
                self.shown,
                usage.tokens,
                most.tokens,
                self._where,
            )

    async def _attempt(self, http: httpx.AsyncClient, body: bytes, question: Question) -> Answer:
        """One request, and what is in its answer."""
        import httpx

        seconds = self.settings.request_timeout
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            async with (
                asyncio.timeout(seconds),
                http.stream("POST", self._url, content=body, headers=headers) as response,
            ):
                content = await self._read(response)
                status, after = response.status_code, response.headers.get("Retry-After")
        except TimeoutError:
            raise _AgainError(f"nothing within {seconds:g} s") from None
        except httpx.TransportError as error:
            reason = self._quoted(str(error)).rstrip(".") or type(error).__name__
            if is_certificate_error(error):
                raise InputError(
                    f"{self._where}: the certificate of {self.shown} cannot be verified ({reason});"
                    f" give {self._where}.ca_file for a certificate of your own"
                ) from error
            unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            raise _AgainError(reason, is_free=unsent) from error
        except (_AgainError, InputError):
            raise
        except Exception as error:  # what a client makes of a proxy, a host name or an answer
            raise InputError(
                f"{self._where}: {self.shown} cannot be asked "
                f"({self._quoted(describe_error(error))}); check base_url and ca_file, and the "
                "proxy that the environment names"
            ) from error
        return self._answer(status, content, after, question)

    async def _read(self, response: httpx.Response) -> bytes:
        limit = self.settings.max_response_mb * _MEGABYTE
        parts, size = [], 0
        async for part in response.aiter_raw():
            size += len(part)
            if size > limit:
                raise _AgainError(
                    f"more than {self.settings.max_response_mb:g} MB ({self._where}."
                    "max_response_mb)",
                    is_final=True,
                )
            parts.append(part)
        return b"".join(parts)

    def _answer(self, status: int, content: bytes, after: str | None, question: Question) -> Answer:
        """What a response holds; see `_AgainError` for what may pass."""
        if status != 200:
            self._refuse(status, content, after)
        try:
            said = json_text.loads(content, surrogates=True, lenient=True)
        except ValueError as error:
            quoted = self._quoted(content[:_QUOTED].decode(errors="replace"))
            raise _AgainError(f"an answer that is not JSON ({error}: {quoted})") from error
        if isinstance(said, dict) and said.get("error") and not said.get("choices"):
            # Some servers tell an error with status 200.
            told = said["error"]
            code = told.get("code") if isinstance(told, dict) else None
            self._refuse(code if isinstance(code, int) and code >= 400 else 500, content, after)
        try:
            return read_answer(said, question)
        except UnusableError as error:
            raise _AgainError(str(error), paid=read_usage(said)) from error

    def _refuse(self, status: int, content: bytes, after: str | None) -> None:
        """Raise what a status other than 200 means."""
        said = self._quoted(content[:_QUOTED].decode(errors="replace"))
        settings, where = self.settings, self._where
        is_over = status == 429 and "insufficient_quota" in said
        if (status in _AGAIN or status >= 500) and not is_over:
            wait = retry_after(after, self._clock.date())
            raise _AgainError(f"status {status} ({said})", wait=wait, is_free=True)
        told = f"{where}: {self.shown} answers with status {status} ({said})"
        if is_over:
            raise InputError(f"{told}; what was paid in there is used up, pay in more")
        if status in (401, 403):
            name = "api_key is not set" if settings.api_key is None else settings.api_key
            raise InputError(f"{told}; check the key of {where}.api_key ({name})")
        if 300 <= status < 400:
            raise InputError(
                f"{told}, and redirects are not followed, since they would carry the key "
                f"elsewhere; write the address that it leads to as {where}.base_url"
            )
        if status == 404:
            raise InputError(
                f"{told}; check {where}.base_url, which mostly ends in /v1, and {where}.model"
            )
        raise InputError(f"{told}; change what it objects to in {where} or sampling")

    def _quoted(self, text: str) -> str:
        """What a server has said, for a sentence: shortened, and without secrets."""
        return shorten(without_secrets(text[:_QUOTED], self._secrets), 200)
