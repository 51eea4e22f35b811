"""Loads the queries of a recipe and divides them into train and held-out, with no overlap.

The order of the queries is that of a hash over seed and text. So the same recipe gives the same
split on every machine and Python, whatever the order of the file, and a file that grows keeps
nearly all its queries on the side they were on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprompt.data.base import DEFAULT_SPLIT, DataSettings, QuerySplit, Table
from rlprompt.data.conversation import build_queries, match_key
from rlprompt.data.files import SUFFIXES, read_file, read_rows
from rlprompt.data.hub import read_hub
from rlprompt.errors import InputError
from rlprompt.reading.files import expanded
from rlprompt.types import Query

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SIDES = ("train", "heldout")

Rows = Mapping[str, Sequence[Any]]
"""Rows in memory, by the path of a recipe that stands for them."""


def load_queries(settings: DataSettings, base_dir: Path, given: Rows | None = None) -> QuerySplit:
    """Read, check, deduplicate and divide the queries that a recipe names.

    Two queries are the same when they differ only in case, white space or the punctuation of a
    sentence. Within one side, the first of them is kept and a warning says how many were dropped.

    Args:
        settings: The data section of the recipe.
        base_dir: The recipe's folder, to which local paths are relative.
        given: Rows in memory, by the path that stands for them.

    Returns:
        Both sides, in an order drawn with `shuffle_seed`.

    Raises:
        InputError: The data cannot be found or read, a row is wrong, a given division overlaps,
            or there are too few queries for it.
    """
    table = read_table(settings, base_dir, given)
    queries = build_queries(table, settings.query_column, settings.split_column)
    if settings.heldout_path is not None:
        train, heldout = _divide_by_file(settings, base_dir, table, queries, given or {})
    elif settings.split_column is not None:
        train, heldout = _divide_by_column(settings, table, queries)
    else:
        train, heldout = _divide_by_draw(settings, table, queries)
    return QuerySplit(
        train=tuple(train), heldout=tuple(heldout), fingerprint=_fingerprint(train, heldout)
    )


def without(split: QuerySplit, left_out: Collection[int]) -> QuerySplit:
    """The split without some queries.

    Args:
        split: queries by side.
        left_out: their `Query.index`.

    Returns:
        The split itself when nothing is left out; else one with a fingerprint of its own.
    """
    if not left_out:
        return split
    train, heldout = (
        tuple(query for query in side if query.index not in left_out)
        for side in (split.train, split.heldout)
    )
    return QuerySplit(train=train, heldout=heldout, fingerprint=_fingerprint(train, heldout))


@dataclass(frozen=True)
class _Side:
    """Distinct queries of one side in drawn order, and where each was found."""

    queries: list[Query]
    places: dict[str, str]


def read_table(settings: DataSettings, base_dir: Path, given: Rows | None = None) -> Table:
    """The rows of a recipe's dataset as they stand; arguments as for `load_queries`.

    Raises:
        InputError: it cannot be found or read, or a setting has no effect on it.
    """
    if settings.path is None:
        _refuse_hub_settings(settings, "rows")
        return read_rows(settings.rows or [], settings.query_column)
    path = settings.path
    if given is not None and path in given:
        _refuse_hub_settings(settings, "rows in memory")
        return read_rows(list(given[path]), settings.query_column, "data")
    names_file = (
        path.lower().endswith(SUFFIXES) or (base_dir / expanded(path, "data.path")).exists()
    )
    if not names_file and HUB_ID.fullmatch(path):
        return read_hub(path, settings.name, settings.split)
    if not names_file:
        raise InputError(
            f"the data path '{path}' is neither a file ending in {', '.join(SUFFIXES)} nor a hub "
            "id of the form owner/name; correct it"
        )
    _refuse_hub_settings(settings, f"the local file '{path}'")
    return read_file(path, base_dir, settings.query_column)


def _refuse_hub_settings(settings: DataSettings, source: str) -> None:
    for setting, unused in (("name", None), ("split", DEFAULT_SPLIT)):
        if getattr(settings, setting) != unused:
            raise InputError(
                f"data.{setting} is for hub datasets and has no effect on {source}; remove it"
            )


def _divide_by_file(
    settings: DataSettings, base_dir: Path, table: Table, queries: list[Query], given: Rows
) -> tuple[list[Query], list[Query]]:
    path = settings.heldout_path or ""
    if path in given:
        other = read_rows(list(given[path]), settings.query_column, "heldout")
    else:
        other = read_file(path, base_dir, settings.query_column)
    held = build_queries(other, settings.query_column, first_index=len(queries))
    if held[0].conversational != queries[0].conversational:
        raise InputError(
            f"one of {table.label} and {other.label} holds text, the other conversations; use one "
            "form in both"
        )
    differing = sorted(held[0].columns.keys() ^ queries[0].columns.keys())
    if differing:
        raise InputError(
            f"only one of {table.label} and {other.label} has the column '{differing[0]}'; give "
            "both files the same columns"
        )
    seed = settings.shuffle_seed
    train = _distinct(queries, [table.where(i) for i in range(len(queries))], table.label, seed)
    heldout = _distinct(held, [other.where(i) for i in range(len(held))], other.label, seed)
    _refuse_overlap(train, heldout)
    return train.queries[: settings.max_queries], heldout.queries


def _divide_by_column(
    settings: DataSettings, table: Table, queries: list[Query]
) -> tuple[list[Query], list[Query]]:
    column = settings.split_column or ""
    members: dict[str, list[int]] = {side: [] for side in SIDES}
    for position, row in enumerate(table.rows):
        side = row[column]
        if side not in SIDES:
            raise InputError(
                f"{table.where(position)} has {side!r} in the split column '{column}'; write "
                "'train' or 'heldout'"
            )
        members[side].append(position)
    for side in SIDES:
        if not members[side]:
            raise InputError(
                f"no row of {table.label} has '{side}' in the split column '{column}'; mark some, "
                "or remove split_column to have them drawn"
            )
    train, heldout = (
        _distinct(
            [queries[i] for i in members[side]],
            [table.where(i) for i in members[side]],
            f"{table.label} ({side})",
            settings.shuffle_seed,
        )
        for side in SIDES
    )
    _refuse_overlap(train, heldout)
    total = len(train.queries) + len(heldout.queries)
    limit = min(settings.max_queries or total, total)
    kept = min(max(1, round(limit * len(heldout.queries) / total)), limit - 1)
    return train.queries[: limit - kept], heldout.queries[:kept]


def _divide_by_draw(
    settings: DataSettings, table: Table, queries: list[Query]
) -> tuple[list[Query], list[Query]]:
    places = [table.where(i) for i in range(len(queries))]
    distinct = _distinct(queries, places, table.label, settings.shuffle_seed).queries
    kept = distinct[: settings.max_queries]
    if isinstance(settings.heldout, int):
        count = settings.heldout
    else:
        count = max(1, round(settings.heldout * len(kept)))
    if count >= len(kept):
        raise InputError(
            f"{table.label} gives {len(kept)} distinct "
            f"{'query' if len(kept) == 1 else 'queries'}, too few to hold out {count} and train "
            "on the rest; add queries, or lower data.heldout (0 holds out none)"
        )
    # Held out from the front: with more queries, those at the front stay there.
    return kept[count:], kept[:count]


def _distinct(queries: Sequence[Query], places: Sequence[str], label: str, seed: int) -> _Side:
    """Keep the first of equal queries, and put the rest in the order of the seed."""
    first: dict[str, Query] = {}
    found: dict[str, str] = {}
    conflicting = 0
    for query, place in zip(queries, places, strict=True):
        key = match_key(query)
        kept = first.setdefault(key, query)
        found.setdefault(key, place)
        conflicting += kept.columns != query.columns
    dropped = len(queries) - len(first)
    if dropped:
        logger.warning(
            "%s: dropped %d duplicate queries (%d with other columns than the first, which was "
            "kept)",
            label,
            dropped,
            conflicting,
        )
    order = sorted(first, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())
    return _Side(queries=[first[key] for key in order], places=found)


def _refuse_overlap(train: _Side, heldout: _Side) -> None:
    for key, place in heldout.places.items():
        if key in train.places:
            text = " ".join(key.split())
            raise InputError(
                f"the query '{text[:80]}' is in both train ({train.places[key]}) and held-out "
                f"({place}); remove it from one"
            )


def _fingerprint(train: Iterable[Query], heldout: Iterable[Query]) -> str:
    digest = hashlib.sha256()
    for side, queries in zip(SIDES, (train, heldout), strict=True):
        for query in queries:
            columns = sorted(query.columns.items())
            content = [side, query.conversational, query.messages, columns]
            digest.update(json.dumps(content, default=repr).encode())
            digest.update(b"\n")
    return digest.hexdigest()
