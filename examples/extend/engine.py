"""An engine of your own: the native one, with a line in the log about how fast it draws.

An engine gives completions under the prompt it was synced with last. One that asks a server would
hold a client here; it must refuse, in `supports`, every prompt that it cannot apply exactly.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from pydantic import Field

import rlprompt.extend as rl

logger = logging.getLogger("rlprompt.timed_engine")  # below `rlprompt`, so that commands show it


class TimedSettings(rl.NativeSettings):
    """The native engine's settings, and how often to report."""

    log_every: int = Field(default=1, ge=1)
    """Rollouts between two lines of the log."""


class TimedEngine(rl.Engine):
    """Draws what the native engine draws."""

    Settings = TimedSettings
    settings: TimedSettings

    def __init__(self, policy: rl.Policy, settings: TimedSettings) -> None:
        """Wrap the native engine.

        Args:
            policy: the policy over the base that completions are drawn from.
            settings: the settings of both engines.
        """
        super().__init__(policy, settings)
        self._native = rl.NativeEngine(policy, settings)
        self._rollouts = 0

    def supports(self, prompt: rl.Prompt) -> bool:
        """Whether the native engine does."""
        return self._native.supports(prompt)

    def sync(self, prompt: rl.Prompt) -> None:
        """Take over the prompt as it is now."""
        self._native.sync(prompt)

    def generate(
        self,
        queries: Sequence[rl.Query],
        num_completions: int,
        sampling: rl.SamplingSettings,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
        first: int = 0,
        keep_products: bool = False,
    ) -> rl.Generation:
        """Draw completions; see `Engine.generate`."""
        start = time.perf_counter()
        drawn = self._native.generate(
            queries, num_completions, sampling, seed, progress, first, keep_products
        )
        seconds = time.perf_counter() - start
        self._rollouts += 1
        if self._rollouts % self.settings.log_every == 0:
            tokens = sum(len(each.token_ids) for g in drawn.groups for each in g.completions)
            logger.info("%d tokens, %.0f per second", tokens, tokens / seconds)
        return drawn
