"""Judged answers, the pairs made of them, and which queries are held out.

A query is wholly on one side: its answers are alike, and a model that has seen some knows something
of the others. The side is decided by a hash over seed and query, so it does not depend on the order
or the number of the rows.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from rlprompt.types import Message


@dataclass(frozen=True)
class Judged:
    """One answer and how good somebody found it."""

    messages: tuple[Message, ...]
    """The query's turns, then the answer."""
    score: float
    """Higher is better."""
    columns: Mapping[str, object] = field(default_factory=dict)
    """The row's other columns, for the rules that the model is compared with."""

    @property
    def query(self) -> str:
        """What tells queries apart."""
        return _query_of(self.messages)


@dataclass(frozen=True)
class Pair:
    """Two answers of which one was preferred; usually, but not always, to one query."""

    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]

    @property
    def query(self) -> str:
        """What tells queries apart."""
        return _query_of(self.chosen)


Row = TypeVar("Row", Judged, Pair)


@dataclass(frozen=True)
class Sides:
    """What the model learns from, what it is calibrated on, and what it is tested on."""

    train: list[Pair]
    calibration: list[Pair]
    heldout: list[Pair]
    calibration_rows: list[Judged] = field(default_factory=list)
    """Judged answers behind the pairs, when the data has them."""
    heldout_rows: list[Judged] = field(default_factory=list)


class Division(NamedTuple, Generic[Row]):
    """Rows on their sides."""

    train: list[Row]
    calibration: list[Row]
    heldout: list[Row]


def divide(rows: Sequence[Row], calibration: float, heldout: float, seed: int) -> Division[Row]:
    """Training, calibration and held-out rows, by query.

    Args:
        rows: judged answers or pairs, any number.
        calibration: share of the queries for calibration.
        heldout: share of the queries for testing.
        seed: number that decides which.
    """
    sides: Division[Row] = Division([], [], [])
    for row in rows:
        place = _place(row.query, seed)
        sides[2 if place < heldout else 1 if place < heldout + calibration else 0].append(row)
    return sides


def pairs_within_queries(
    rows: Sequence[Judged], min_gap: float, limit: int, seed: int
) -> list[Pair]:
    """Pairs of answers to one query whose scores differ by `min_gap` or more; at most `limit`."""
    found = [
        Pair(better.messages, worse.messages)
        for group in _by_query(rows).values()
        for better in group
        for worse in group
        if better.score - worse.score >= min_gap
    ]
    return found if len(found) <= limit else random.Random(seed).sample(found, limit)


def pairs_across_queries(
    rows: Sequence[Judged], min_gap: float, per_row: int, seed: int
) -> list[Pair]:
    """`per_row` pairs for each answer with others whose score differs by `min_gap` or more.

    Half of them are answers to the same query where there are such, the rest any.

    A Bradley-Terry model of such pairs learns one scale for all queries, which a judgement of
    single answers needs; most queries of judged data have one answer only.
    """
    draw = random.Random(seed)
    groups = _by_query(rows)
    pairs = []
    for row in rows:
        far = [other for other in rows if abs(other.score - row.score) >= min_gap]
        near = [o for o in groups[row.query] if abs(o.score - row.score) >= min_gap]
        for turn in range(per_row if far else 0):
            other = draw.choice(near if near and turn % 2 == 0 else far)
            better, worse = (row, other) if row.score > other.score else (other, row)
            pairs.append(Pair(better.messages, worse.messages))
    return pairs


def _by_query(rows: Sequence[Judged]) -> dict[str, list[Judged]]:
    groups: dict[str, list[Judged]] = {}
    for row in rows:
        groups.setdefault(row.query, []).append(row)
    return groups


def _place(query: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\n{query}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _query_of(messages: Sequence[Message]) -> str:
    return "\n".join(" ".join(m["content"].lower().split()) for m in messages[:-1])
