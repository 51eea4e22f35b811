"""A budget of minutes, shared out among the parts of an inspection."""

from __future__ import annotations

import time
from collections.abc import Callable


class Slice:
    """The time of one part; it may be asked between two pieces of work whether it is over."""

    def __init__(self, until: float, now: Callable[[], float]) -> None:
        """Keep the end.

        Args:
            until: moment of the end, in seconds of `now`.
            now: clock in seconds.
        """
        self._until = until
        self._now = now

    @property
    def is_over(self) -> bool:
        """Whether no time is left."""
        return self._now() >= self._until

    @property
    def seconds_left(self) -> float:
        """Seconds until it is over, at least 0."""
        return max(0.0, self._until - self._now())

    def allows(self, seconds: float) -> bool:
        """Whether so much more work would end in time."""
        return self._now() + seconds <= self._until

    def part(self, share: float) -> Slice:
        """A slice of what is left of this one.

        Args:
            share: share of the time left, in (0, 1].
        """
        return Slice(self._now() + share * self.seconds_left, self._now)


class Clock:
    """The budget of a whole inspection. What a part leaves goes to those after it."""

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        """Start now.

        Args:
            minutes: length of the budget.
            now: clock in seconds.
        """
        self._now = now
        self._start = now()
        self._end = self._start + 60.0 * minutes

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._now() - self._start

    def slice(self, weight: float, weight_left: float) -> Slice:
        """The time of the next part.

        Args:
            weight: weight of this part.
            weight_left: weights of this part and of all after it, added up.
        """
        left = max(0.0, self._end - self._now())
        return Slice(self._now() + left * weight / weight_left, self._now)
