"""Loads the queries of a recipe and divides them into train, validation and test, without overlap.

The order of the queries is that of a hash over seed and text. So the same recipe gives the same
splits on every machine and Python, whatever the order of the file, and a file that grows keeps
nearly all its queries in the split they were in.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprompt.data.base import DEFAULT_SPLIT, DataSettings, QuerySplit, Table, TestSettings
from rlprompt.data.conversation import build_queries, common_system, match_key
from rlprompt.data.files import SUFFIXES, read_file, read_rows
from rlprompt.data.hub import read_hub
from rlprompt.data.near_duplicates import find_near_duplicates
from rlprompt.errors import InputError
from rlprompt.reading.files import expanded
from rlprompt.types import Query

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SIDES = {"train": "train", "heldout": "validation", "test": "test"}
"""The splits, by the name of their field, and what the split column and messages call them."""
SPELLINGS = {
    "train": "train",
    "training": "train",
    "validation": "heldout",
    "valid": "heldout",
    "val": "heldout",
    "dev": "heldout",
    "heldout": "heldout",
    "held-out": "heldout",
    "held_out": "heldout",
    "test": "test",
}
"""Values of a split column that are understood, in small letters."""

Rows = Mapping[str, Sequence[Any]]
"""Rows in memory, by the path of a recipe that stands for them."""


def load_queries(
    settings: DataSettings,
    base_dir: Path,
    given: Rows | None = None,
    answers: Sequence[str] = (),
) -> QuerySplit:
    """Read, check, deduplicate and divide the queries that a recipe names.

    Two queries are the same when they differ only in case, white space or the punctuation of a
    sentence. Within one split, the first of them is kept and a warning says how many were dropped;
    in two splits they are refused. Near-duplicates in two splits (`find_near_duplicates`) are
    warned of, with their number and an example: queries of one template may be meant.

    Args:
        settings: The data section of the recipe.
        base_dir: The recipe's folder, to which local paths are relative.
        given: Rows in memory, by the path that stands for them.
        answers: Columns with the answers that an algorithm learns from, which are checked.

    Returns:
        The splits, each in an order drawn with `shuffle_seed`.

    Raises:
        InputError: The data cannot be found or read, a row is wrong, a given division overlaps,
            or there are too few queries for it.
    """
    table = read_table(settings, base_dir, given)
    queries = build_queries(
        table,
        settings.query_column,
        settings.split_column,
        system=settings.system,
        answers=answers,
    )
    source = _Source(settings, base_dir, table, queries, given or {}, answers, [table])
    sides = _divide_by_column(source) if settings.split_column else _divide_by_draw(source)
    if settings.heldout_path is not None:
        sides["heldout"] = _read_beside(source, settings.heldout_path, "heldout", len(queries))
    if isinstance(settings.test, TestSettings):
        if sides["test"].queries:
            raise InputError(
                f"test queries are in '{settings.test.path}' and marked in the split column "
                f"'{settings.split_column}' of {table.label}; keep one of them"
            )
        first_index = len(queries) + (sides["heldout"].rows if settings.heldout_path else 0)
        sides["test"] = _read_beside(source, settings.test.path, "test", first_index)
    _refuse_overlap(sides)
    kept = _limited(sides, settings)
    _warn_of_near_duplicates(kept)
    if settings.test is None and not kept["test"].queries:
        logger.info(
            "%s has no test queries: a result on the validation queries, by which the prompt is "
            "chosen, looks better than it is; set data.test, or mark rows as test",
            table.label,
        )
    system = None
    if settings.system == "init":
        system = common_system(source.tables, settings.query_column, answers)
    queries_of = {side: tuple(kept[side].queries) for side in SIDES}
    return QuerySplit(**queries_of, fingerprint=_fingerprint(queries_of), system=system)


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
    kept = {
        side: tuple(query for query in queries if query.index not in left_out)
        for side, queries in split.sides.items()
    }
    return QuerySplit(**kept, fingerprint=_fingerprint(kept), system=split.system)


@dataclass(frozen=True)
class _Source:
    """What a division starts from."""

    settings: DataSettings
    base_dir: Path
    table: Table
    queries: list[Query]
    given: Rows
    answers: Sequence[str]
    tables: list[Table]
    """Those that were read, this one and files beside it."""


@dataclass(frozen=True)
class _Side:
    """Distinct queries of one split in drawn order; `keys` and `places` go with `queries`."""

    queries: Sequence[Query] = ()
    keys: Sequence[str] = ()
    places: Sequence[str] = ()
    rows: int = 0
    """Rows of the source, duplicates included."""

    def part(self, start: int, stop: int | None) -> _Side:
        """Those from `start` up to `stop`."""
        part = slice(start, stop)
        return _Side(self.queries[part], self.keys[part], self.places[part], self.rows)


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


def _read_beside(source: _Source, path: str, name: str, first_index: int) -> _Side:
    """A split in a file of its own, which must have the form and columns of the dataset."""
    settings, table, queries = source.settings, source.table, source.queries
    if path in source.given:
        other = read_rows(list(source.given[path]), settings.query_column, name)
    else:
        other = read_file(path, source.base_dir, settings.query_column)
    column = settings.split_column
    if column is not None and column in other.rows[0]:
        _require_marks(other, column, name)
    else:
        column = None
    source.tables.append(other)
    beside = build_queries(
        other,
        settings.query_column,
        column,
        first_index,
        system=settings.system,
        answers=source.answers,
    )
    if beside[0].conversational != queries[0].conversational:
        raise InputError(
            f"one of {table.label} and {other.label} holds text, the other conversations; use one "
            "form in both"
        )
    differing = sorted(beside[0].columns.keys() ^ queries[0].columns.keys())
    if differing:
        raise InputError(
            f"only one of {table.label} and {other.label} has the column '{differing[0]}'; give "
            "both files the same columns"
        )
    return _distinct(beside, other, range(len(beside)), other.label, settings.shuffle_seed)


def _divide_by_column(source: _Source) -> dict[str, _Side]:
    settings, table = source.settings, source.table
    column = settings.split_column or ""
    members: dict[str, list[int]] = {side: [] for side in SIDES}
    for position, row in enumerate(table.rows):
        side = _side_of(row[column])
        if side is None:
            raise InputError(
                f"{table.where(position)} has {row[column]!r} in the split column '{column}'; "
                "write 'train', 'validation' or 'test'"
            )
        members[side].append(position)
    for side in ("train", "heldout"):
        if not members[side]:
            raise InputError(
                f"no row of {table.label} has '{SIDES[side]}' in the split column '{column}'; mark "
                "some, or remove split_column to have them drawn"
            )
    return {
        side: _distinct(
            [source.queries[i] for i in positions],
            table,
            positions,
            f"{table.label} ({SIDES[side]})",
            settings.shuffle_seed,
        )
        for side, positions in members.items()
    }


def _require_marks(table: Table, column: str, name: str) -> None:
    for position, row in enumerate(table.rows):
        if _side_of(row.get(column)) != name:
            raise InputError(
                f"{table.where(position)} is for the {SIDES[name]} split and has "
                f"{row.get(column)!r} in the split column '{column}'; leave only rows marked "
                f"'{SIDES[name]}' there"
            )


def _side_of(value: Any) -> str | None:
    """The split that a value of the split column means, None for none."""
    return SPELLINGS.get(value.strip().casefold()) if isinstance(value, str) else None


def _divide_by_draw(source: _Source) -> dict[str, _Side]:
    settings, table, queries = source.settings, source.table, source.queries
    everything = _distinct(queries, table, range(len(queries)), table.label, settings.shuffle_seed)
    total = len(everything.part(0, settings.max_queries).queries)
    asked = {
        "heldout": 0 if settings.heldout_path is not None else settings.heldout,
        "test": settings.test if isinstance(settings.test, int | float) else 0,
    }
    counts = {
        side: share if isinstance(share, int) else max(1, round(share * total))
        for side, share in asked.items()
    }
    heldout, test = counts["heldout"], counts["test"]
    if heldout + test >= total:
        held_out = [f"hold out {heldout}"] if heldout or not test else []
        wanted = ", ".join([*held_out, f"test on {test}"] if test else held_out)
        names = " or ".join(f"data.{side}" for side, count in counts.items() if count)
        raise InputError(
            f"{table.label} gives {total} distinct {'query' if total == 1 else 'queries'}, too few "
            f"to {wanted} and train on the rest; add queries, or lower {names or 'data.heldout'} "
            "(0 holds out none)"
        )
    # Held out from the front: with more queries, those at the front stay there.
    return {
        "train": everything.part(heldout + test, None),
        "heldout": everything.part(0, heldout),
        "test": everything.part(heldout, heldout + test),
    }


def _limited(sides: Mapping[str, _Side], settings: DataSettings) -> Mapping[str, _Side]:
    """At most `max_queries` of the dataset; what lies in files beside it is not counted."""
    limit = settings.max_queries
    if limit is None:
        return sides
    train, heldout = sides["train"], sides["heldout"]
    if settings.split_column is None:
        drawn = 0 if settings.heldout_path is not None else len(heldout.queries)
        drawn += 0 if isinstance(settings.test, TestSettings) else len(sides["test"].queries)
        return {**sides, "train": train.part(0, limit - drawn)}
    total = len(train.queries) + len(heldout.queries)
    limit = min(limit, total)
    held = min(max(1, round(limit * len(heldout.queries) / total)), limit - 1)
    return {**sides, "train": train.part(0, limit - held), "heldout": heldout.part(0, held)}


def _distinct(
    queries: Sequence[Query], table: Table, positions: Sequence[int], label: str, seed: int
) -> _Side:
    """Keep the first of equal queries, and put the rest in the order of the seed."""
    first: dict[str, Query] = {}
    places: dict[str, str] = {}
    conflicting = 0
    for query, position in zip(queries, positions, strict=True):
        key = match_key(query)
        kept = first.setdefault(key, query)
        if kept is query:
            places[key] = table.where(position)
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
    return _Side([first[key] for key in order], order, [places[key] for key in order], len(queries))


def _refuse_overlap(sides: Mapping[str, _Side]) -> None:
    for one, other in itertools.combinations(SIDES, 2):
        places = dict(zip(sides[one].keys, sides[one].places, strict=True))
        for key, place in zip(sides[other].keys, sides[other].places, strict=True):
            if key in places:
                raise InputError(
                    f"the query '{_shortened(key)}' is in both {SIDES[one]} ({places[key]}) and "
                    f"{SIDES[other]} ({place}); remove it from one"
                )


def _warn_of_near_duplicates(sides: Mapping[str, _Side]) -> None:
    for one, other in itertools.combinations(SIDES, 2):
        found = find_near_duplicates(sides[other].keys, sides[one].keys)
        if not found.is_complete:
            logger.warning(
                "the queries of %s and %s are so alike that not all pairs were compared for "
                "near-duplicates; at least %d were found",
                SIDES[other],
                SIDES[one],
                len(found.pairs),
            )
        if found.pairs:
            position, twin = found.pairs[0]
            logger.warning(
                "%d of %d %s queries share more than 80%% of their words with one of %s, such as "
                "'%s' (%s) with '%s' (%s): remove them from one side if they ask the same",
                len(found.pairs),
                len(sides[other].keys),
                SIDES[other],
                SIDES[one],
                _shortened(sides[other].keys[position]),
                sides[other].places[position],
                _shortened(sides[one].keys[twin]),
                sides[one].places[twin],
            )


def _shortened(key: str) -> str:
    return " ".join(key.split())[:80]


def _fingerprint(splits: Mapping[str, Iterable[Query]]) -> str:
    """Of the content of all splits; one without queries adds nothing."""
    digest = hashlib.sha256()
    for side, queries in splits.items():
        for query in queries:
            columns = sorted(query.columns.items())
            content = [side, query.conversational, query.messages, columns]
            digest.update(json.dumps(content, default=repr).encode())
            digest.update(b"\n")
    return digest.hexdigest()
