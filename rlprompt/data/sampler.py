"""Draws query numbers for training: epoch by epoch, seeded, and resumable exactly."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from rlprompt.errors import InputError


class QuerySampler:
    """Draws batches without replacement; each epoch is a new seeded permutation.

    A batch may reach into the next epoch. The queries it already holds are then passed over and
    come later in that epoch, so no batch holds a query twice unless it is larger than the dataset.
    """

    def __init__(self, num_queries: int, batch_size: int, seed: int) -> None:
        """Start at the first epoch.

        Raises:
            InputError: `num_queries` or `batch_size` is below 1.
        """
        for name, value in (("num_queries", num_queries), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"{name} is {value}; a batch of queries needs at least 1")
        self.num_queries = num_queries
        self.batch_size = batch_size
        self.seed = seed
        self._num_epochs = 0
        # Drawn from the end.
        self._remaining: list[int] = []

    @property
    def epoch(self) -> float:
        """Number of times the dataset has been drawn, with the fraction of the current epoch."""
        return self._num_epochs - len(self._remaining) / self.num_queries

    def next(self) -> list[int]:
        """Draw `batch_size` query numbers, each in `range(num_queries)`."""
        batch: list[int] = []
        while len(batch) < self.batch_size:
            if not self._remaining:
                self._start_epoch()
            held = set(batch) if self.batch_size <= self.num_queries else set()
            passed_over: list[int] = []
            while self._remaining and len(batch) < self.batch_size:
                number = self._remaining.pop()
                (passed_over if number in held else batch).append(number)
            self._remaining.extend(reversed(passed_over))
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Give the state as plain JSON values; a sampler that loads it draws the same batches."""
        return {
            "num_queries": self.num_queries,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "num_epochs": self._num_epochs,
            "remaining": list(self._remaining),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            InputError: It was taken with another dataset size, batch size or seed.
        """
        for name in ("num_queries", "batch_size", "seed"):
            if state[name] != getattr(self, name):
                raise InputError(
                    f"the checkpoint was written with {name} {state[name]} but the recipe gives "
                    f"{getattr(self, name)}; resume with the recipe and data it was trained on"
                )
        self._num_epochs = int(state["num_epochs"])
        self._remaining = [int(number) for number in state["remaining"]]

    def _start_epoch(self) -> None:
        order = list(range(self.num_queries))
        random.Random(f"{self.seed}:{self._num_epochs}").shuffle(order)
        self._num_epochs += 1
        self._remaining = order
