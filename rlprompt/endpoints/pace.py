"""When the next request may begin: rate limits, waits between attempts, what Retry-After says.

Nothing here knows a server. Clocks are given, so that tests need not wait.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import random
import time
from collections import deque

_MINUTE = 60.0
_LONGEST_BACKOFF = 60.0


class Clock:
    """Time as it passes; a test gives one of its own."""

    def now(self) -> float:
        """Seconds that only go forward; differences mean something."""
        return time.monotonic()

    def date(self) -> float:
        """Seconds since 1970, UTC."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)


class Pace:
    """At most so many attempts, and so many tokens, within any minute."""

    def __init__(self, requests: int | None, tokens: int | None) -> None:
        """Begin with an empty minute.

        Args:
            requests: most attempts that begin within a minute; None = no limit.
            tokens: most tokens of attempts that begin within a minute; None = no limit.
        """
        self._requests = requests
        self._tokens = tokens
        self._begun: deque[list[float]] = deque()
        """[time, tokens] of attempts within the last minute, oldest first."""
        self._not_before = -math.inf

    def wait(self, now: float, tokens: int) -> float:
        """Seconds until an attempt of so many tokens may begin; 0 = now.

        One that is larger than a whole minute's tokens begins when the minute is empty.
        """
        while self._begun and self._begun[0][0] <= now - _MINUTE:
            self._begun.popleft()
        until = self._not_before
        if self._requests is not None and len(self._begun) >= self._requests:
            until = max(until, self._begun[-self._requests][0] + _MINUTE)
        if self._tokens is not None:
            until = max(until, self._room(tokens, self._tokens))
        return max(0.0, until - now)

    def _room(self, tokens: int, limit: int) -> float:
        """The moment at which enough tokens have left the last minute."""
        held, moment = sum(each for _, each in self._begun), -math.inf
        for begun, each in self._begun:
            if held + tokens <= limit:
                break
            held -= each
            moment = begun + _MINUTE
        return moment

    def begin(self, now: float, tokens: int) -> list[float]:
        """Note that an attempt begins.

        Args:
            now: time on the clock.
            tokens: most tokens that it can take.

        Returns:
            What `settle` takes.
        """
        entry = [now, float(tokens)]
        self._begun.append(entry)
        return entry

    def settle(self, entry: list[float], tokens: int) -> None:
        """Note what an attempt has really taken.

        Args:
            entry: what `begin` gave.
            tokens: number of tokens.
        """
        entry[1] = float(tokens)

    def hold(self, until: float) -> None:
        """Begin nothing before a moment: a server has said so."""
        self._not_before = max(self._not_before, until)


def backoff(attempt: int, base: float, chance: random.Random) -> float:
    """Seconds before a further attempt: doubled each time, up to a minute, and spread.

    Args:
        attempt: number of attempts that failed, at least 1.
        base: seconds after the first.
        chance: generator of the factor in [0.5, 1], so that many clients do not come back together.
    """
    doubled = base * 2.0 ** min(attempt - 1, 60)
    return min(_LONGEST_BACKOFF, doubled) * chance.uniform(0.5, 1.0)


def retry_after(value: str | None, date: float) -> float | None:
    """Seconds that a Retry-After header asks to wait (RFC 9110, 10.2.3); None = it says nothing.

    Args:
        value: number of seconds, or an HTTP date.
        date: the present, in seconds since 1970.
    """
    text = (value or "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = email.utils.parsedate_to_datetime(text)
            seconds = moment.timestamp() - date
        except (ValueError, TypeError, OverflowError, OSError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
