"""One batch scored by several ranks: who calls which reward, and how their answers become one.

A reward is called once per batch on one rank. On several, each rank calls it with whole groups of
its own (`all`), or the first rank calls it with the whole batch (`first`), or every rank does so at
the same time (`together`), for a model of which each holds a part. What the ranks got is put
together as if one call had given it.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from rlprompt.rewards.base import RewardFailure
from rlprompt.rewards.validation import mean

T = TypeVar("T")

Way = Literal["all", "first", "together"]
"""How ranks call a reward; see the module."""


class RankGroup(Protocol):
    """The ranks of a run, as far as scoring needs them (`rlprompt.distributed.ranks.Ranks`)."""

    @property
    def rank(self) -> int:
        """Number of this one."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    @property
    def local_rank(self) -> int:
        """Number of this one on its node."""
        ...

    def share(self, count: int) -> slice:
        """This rank's part of a list."""
        ...

    def first(self, work: Callable[[], T], what: str = ...) -> T:
        """Do something on the first rank; every rank gets the result."""
        ...

    def each(self, work: Callable[[], T], what: str) -> list[T]:
        """Do something on every rank; every rank gets all results."""
        ...


@dataclass(frozen=True)
class OneRank:
    """A process that scores alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def share(self, count: int) -> slice:
        """Everything."""
        return slice(0, count)

    def first(self, work: Callable[[], T], what: str = "") -> T:
        """Do it."""
        del what
        return work()

    def each(self, work: Callable[[], T], what: str) -> list[T]:
        """Do it."""
        del what
        return [work()]


@dataclass(frozen=True)
class Elsewhere:
    """Stands on the other ranks for a reward that only the first one loads and calls."""

    needs_base: bool
    """Whether it can only judge with the base of a run."""
    needs_all_ranks: bool
    """Whether its model is in shards."""

    def __call__(self, **kwargs: Any) -> Any:
        """Never called."""
        raise AssertionError("a reward of the first rank was called on another one")


@dataclass(frozen=True)
class Part:
    """What one call of a reward gave for some completions of a batch."""

    count: int
    """How many completions."""
    values: list[float] | RewardFailure
    """One per completion, NaN = not scored; or why there are none."""
    seconds: float
    """That the call took."""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    """Columns of `log_extra`, one plain value per completion."""
    numbers: dict[str, list[float]] = field(default_factory=dict)
    """Numbers of `log_metric` by the name in the run's record, in the order of the calls."""


def wants_first_rank(function: Any) -> bool:
    """Whether a reward says itself that it is for the first rank, with the whole batch in a call.

    Args:
        function: reward, with the recipe's options bound or not; it says so by an attribute
            `on_first_rank` that is true.
    """
    while isinstance(function, functools.partial):
        function = function.func
    return bool(getattr(function, "on_first_rank", False))


def group_rows(index: Sequence[int], groups: slice) -> slice:
    """The completions of some groups.

    Args:
        index: number of each completion's group, in ascending order.
        groups: numbers of the groups.
    """
    return slice(bisect_left(index, groups.start), bisect_left(index, groups.stop))


def joined(parts: Sequence[Part]) -> Part:
    """What one call on all completions would have given.

    A reward that failed on one rank has failed for the batch, as on one rank. A metric that each
    part logged once is a mean over its completions, and parts count by their completions; where a
    part logged several numbers, or none, each number counts alike.

    Args:
        parts: the parts in the order of their completions, at least one.
    """
    if len(parts) == 1:
        return parts[0]
    count, seconds = sum(part.count for part in parts), max(part.seconds for part in parts)
    values: list[float] = []
    for part in parts:
        if isinstance(part.values, RewardFailure):
            return Part(count, part.values, seconds)
        values += part.values
    columns = dict.fromkeys(name for part in parts for name in part.extras)
    extras = {
        name: [value for part in parts for value in part.extras.get(name, [None] * part.count)]
        for name in columns
    }
    metrics = dict.fromkeys(name for part in parts for name in part.numbers)
    numbers = {name: _numbers(parts, name) for name in metrics}
    return Part(count, values, seconds, extras, numbers)


def _numbers(parts: Sequence[Part], name: str) -> list[float]:
    """The numbers of a metric as one call would have logged them."""
    logged = [part.numbers.get(name, []) for part in parts]
    if any(len(own) != 1 for own in logged):
        return [number for own in logged for number in own]
    total = sum(part.count for part in parts)
    if len({part.count for part in parts}) == 1:
        return [mean([number for own in logged for number in own])]
    shares = zip(logged, parts, strict=True)
    return [sum(own[0] * (part.count / total) for own, part in shares)]
