"""Which training queries a search proposes by, and which it only tests with."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Self

from rlprompt.errors import InputError
from rlprompt.search.base import SearchStart
from rlprompt.types import Query

FEWEST = 4
"""Training queries that can be divided."""


class Division:
    """Training queries in two parts, once and for good, each in an order of its own.

    Without a list of queries nothing can be kept apart: whoever drives the searcher then has to
    have the two kinds of step meet different ones.
    """

    def __init__(
        self,
        for_fitness: Sequence[Query],
        for_tests: Sequence[Query],
        per_step: int = 1,
        seed: int = 0,
    ) -> None:
        """Keep both parts.

        Args:
            for_fitness: queries that evolution runs on; none = the run's own order.
            for_tests: queries that decide what replaces the incumbent.
            per_step: queries that a step meets.
            seed: seed of the orders.
        """
        self._fitness = tuple(for_fitness)
        self._tests = tuple(for_tests)
        self._seed = seed
        self._per_step = per_step

    @classmethod
    def of(cls, given: SearchStart, share: float) -> Self:
        """Divide the training queries of a search.

        Args:
            given: where the search starts.
            share: share of the queries that is for tests; 0 = none are set apart.

        Raises:
            InputError: there are too few queries.
        """
        by_index = {query.index: query for query in given.queries}
        if not by_index or share == 0.0:
            return cls((), ())
        if len(by_index) < FEWEST:
            raise InputError(
                f"search.evidence sets training queries apart for tests, and there are only "
                f"{len(by_index)} of {FEWEST} that it takes; give more, or set search.evidence to "
                "null"
            )
        order = sorted(by_index)
        random.Random(f"{given.seed}:division").shuffle(order)
        count = min(max(2, round(share * len(order))), len(order) - 2)
        chosen = [by_index[each] for each in order]
        return cls(chosen[count:], chosen[:count], given.queries_per_step, given.seed)

    @property
    def for_fitness(self) -> Sequence[Query]:
        """The queries that fitness steps run on; none = the run's own order."""
        return self._fitness

    @property
    def for_tests(self) -> Sequence[Query]:
        """The queries that are kept apart for tests."""
        return self._tests

    def fitness(self, step: int) -> Sequence[Query] | None:
        """The fitness queries of a fitness step; None = whatever comes next in the run's order.

        Args:
            step: number of fitness steps before it.
        """
        if not self._fitness:
            return None
        size = len(self._fitness)
        count = min(self._per_step, size)
        found: list[Query] = []
        for place in range(step * count, (step + 1) * count):
            epoch, inside = divmod(place, size)
            order = list(range(size))
            random.Random(f"{self._seed}:epoch:{epoch}").shuffle(order)
            found.append(self._fitness[order[inside]])
        # Where an epoch ends within a step, a query may come twice.
        return tuple({query.index: query for query in found}.values())

    def tests(self, met: Collection[int]) -> Sequence[Query] | None:
        """The next test queries for a pair; empty = it has met them all, None = nobody knows.

        Args:
            met: indices of the test queries that the pair has met.
        """
        if not self._tests:
            return None
        left = [query for query in self._tests if query.index not in met]
        return tuple(left[: self._per_step])
