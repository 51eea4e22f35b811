"""Rollouts of the next batch while this one is learned from.

A thread draws and scores batch t + 1 under a copy of the prompt as it was before update t, while
update t runs in the main thread. Engine, rewards and the position in the data are the thread's own
until its batch is there, and the update does not end before: no result depends on which of the two
is faster, and rewards are called in one order. What both use, the base and its packed weights, is
frozen. The engine keeps no products of such a rollout: when its batch has its turn, the prompt has
been updated.

A batch that waits for its turn is not written into checkpoints. They hold what it was drawn from,
the copy, the position and the process-wide generators, and a resumed run draws it again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from rlprompt.prompts.base import Prompt
from rlprompt.random_state import global_random_state, restore_global_random_state
from rlprompt.rewards.processes.execution import JobThread
from rlprompt.rollout.collect import RolloutBatch
from rlprompt.rollout.sources import RolloutSource
from rlprompt.types import Stateful

WAITED = "overlap/waited/seconds"
"""Metric: how long an update, when done, waited for the batch that was drawn meanwhile."""


class _EndedError(Exception):
    """Nobody waits for the rollout any more."""


@dataclass(frozen=True)
class _Drawn:
    """What came of a rollout."""

    batch: RolloutBatch
    epoch: float
    seconds: float


class _Behaviour:
    """The prompt that batches are drawn under, and the generators as they were before."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.random: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        return {**{f"prompt/{k}": v for k, v in self.prompt.state_dict().items()}, **self.random}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        start = "prompt/"
        own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        self.prompt.load_state_dict(own)
        self.random = {k: v for k, v in state.items() if not k.startswith(start)}


class PrefetchedSource:
    """A source of rollouts that draws a batch ahead; see the module."""

    def __init__(self, source: RolloutSource, prompt: Prompt, behaviour: Prompt) -> None:
        """Nothing is drawn yet.

        Args:
            source: the source that draws under `behaviour`.
            prompt: the one that is trained.
            behaviour: a copy of it, which nobody else uses.
        """
        self._source = source
        self._prompt = prompt
        self._behaviour = _Behaviour(behaviour)
        self._start: dict[str, Any] | None = None
        """Where the batch that waits for its turn was begun; None without one."""
        self._drawn: _Drawn | None = None
        """That batch; None in a resumed run, until it has been drawn again."""
        self._epoch = source.epoch
        self._thread: JobThread | None = None

    @property
    def temperature(self) -> float:
        """The sampling temperature."""
        return self._source.temperature

    @property
    def epoch(self) -> float:
        """Passes over the training queries, up to the batch given last."""
        return self._epoch

    def collect(self, step: int, seed: int) -> RolloutBatch:
        """The batch that was drawn ahead; without one, a batch under the prompt as it is."""
        if self._start is None:
            self._follow()
            drawn = self._draw(step, seed, keep_products=True)
        else:
            drawn = self._drawn or self._draw_again(step, seed)
        prefetched, self._epoch = self._start is not None, drawn.epoch
        self._start, self._drawn, self._behaviour.random = None, None, {}
        return replace(drawn.batch, prefetched=prefetched)

    @contextmanager
    def prefetch(self, step: int, seed: int) -> Iterator[dict[str, float]]:
        """Draw the batch of a step, under the prompt as it is now, while the block runs.

        The block does not end before the batch is there. When it fails, the rollout is ended.

        Raises:
            InputError: what a reward raised in the thread. At once, not when the batch has its
                turn: process-wide generators are not where they would be, so nothing may be
                evaluated or saved in between.
        """
        self._follow()
        self._behaviour.random, state = global_random_state()
        self._start = {"position": self._source.state_dict(), "random": state}
        end = threading.Event()
        self._source.progress = partial(_raise_if, end)
        answer: queue.SimpleQueue[_Drawn | BaseException] = queue.SimpleQueue()
        self._running().jobs.put(lambda: answer.put(self._attempt(step, seed)))
        metrics: dict[str, float] = {}
        try:
            yield metrics
            learned = time.perf_counter()
            drawn = answer.get()
        except BaseException as error:
            end.set()
            if isinstance(error, Exception):  # not Ctrl-C: the next token or the exit ends it
                answer.get()
                self._source.progress = None
            raise
        self._source.progress = None
        if isinstance(drawn, BaseException):
            raise drawn
        self._drawn = drawn
        waited = time.perf_counter() - learned
        metrics["overlap/drawn/seconds"] = drawn.seconds
        metrics["overlap/hidden/seconds"] = max(0.0, drawn.seconds - waited)
        metrics[WAITED] = waited

    @property
    def others(self) -> Mapping[str, Stateful]:
        """What the batch that waits was drawn under."""
        return {"behaviour": self._behaviour}

    def state_dict(self) -> dict[str, Any]:
        """The position in the data before the batch that waits."""
        return self._start or {"position": self._source.state_dict(), "random": None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; a batch that waited then is drawn again."""
        self._source.load_state_dict(state["position"])
        self._source.progress = None
        self._drawn = None
        self._start = None if state["random"] is None else dict(state)

    def close(self) -> None:
        """End the thread; a later block starts a new one."""
        if self._thread is not None:
            self._thread.jobs.put(None)
            self._thread = None

    def _follow(self) -> None:
        self._behaviour.prompt.load_state_dict(self._prompt.state_dict())

    def _draw(self, step: int, seed: int, *, keep_products: bool = False) -> _Drawn:
        start = time.perf_counter()
        batch = self._source.collect(step, seed, keep_products=keep_products)
        return _Drawn(batch, self._source.epoch, time.perf_counter() - start)

    def _attempt(self, step: int, seed: int) -> _Drawn | BaseException:
        try:
            return self._draw(step, seed)
        except BaseException as error:  # the main thread raises it
            return error

    def _draw_again(self, step: int, seed: int) -> _Drawn:
        """As it was drawn before the run was stopped, and nothing else moved."""
        assert self._start is not None
        now = global_random_state()
        restore_global_random_state(self._behaviour.random, self._start["random"])
        self._source.load_state_dict(self._start["position"])
        drawn = self._draw(step, seed)
        restore_global_random_state(*now)
        return drawn

    def _running(self) -> JobThread:
        if self._thread is None:
            self._thread = JobThread("rlprompt-rollouts")
            self._thread.start()
        return self._thread


def _raise_if(end: threading.Event, *progress: int) -> None:
    if end.is_set():
        raise _EndedError
