"""How long a run may train: a limit in seconds beside the number of steps.

For comparisons at equal time. Only steps count, not held-out evaluation and not loading. The clock
is the wall's or the CPU time of this process; the second one goes on at the same pace while others
use the machine, so that runs on a shared one can be compared.
"""

from __future__ import annotations

import time

from rlprompt.runs.settings import RunSettings


class Budget:
    """The limit of a run; where the run stands is in its progress, not here."""

    def __init__(self, settings: RunSettings) -> None:
        """Keep limit and clock."""
        self._limit = settings.max_seconds
        self._clock = time.process_time if settings.clock == "cpu" else time.perf_counter

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit at all."""
        return self._limit is not None

    def now(self) -> float:
        """Seconds on the clock; only differences mean something."""
        return self._clock()

    def share(self, spent: float) -> float:
        """The share of the limit that `spent` seconds are, 0 without one."""
        return 0.0 if self._limit is None else spent / self._limit

    def is_spent(self, spent: float) -> bool:
        """Whether `spent` seconds reach the limit."""
        return self.share(spent) >= 1.0
