"""Reads rows from a local file or from the recipe itself.

JSON and CSV are read with the standard library, because a wrong file must be reported with its
line; and because cells then stay what the file says: a CSV cell is text ("007" is not 7, "NA" is
not missing). Use JSONL or Parquet for typed columns.
"""

from __future__ import annotations

import csv
import difflib
import sys
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from rlprompt.data.base import Table
from rlprompt.errors import InputError, shorten
from rlprompt.reading import json_text
from rlprompt.reading.files import (
    DATA_BYTES,
    expanded,
    in_words,
    read_bytes,
    reason,
    require_regular,
)

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_file(path: str, base_dir: Path, query_column: str) -> Table:
    """Read a local dataset file.

    Args:
        path: The file, relative to `base_dir` unless absolute; `~` is the home folder.
        base_dir: The recipe's folder.
        query_column: The column under which a bare JSON string is stored.

    Returns:
        Its rows, at least one.

    Raises:
        InputError: The file is missing, of another type, unreadable or empty.
    """
    file = base_dir / expanded(path, "the data path")
    if not file.exists():
        raise InputError(_missing_message(path, file))
    if file.is_dir():
        raise InputError(f"the data path '{path}' is a folder; name one file in it ({_types()})")
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise InputError(f"the data file '{path}' is not of a type that is read; use {_types()}")
    try:
        table = reader(file, query_column)
    except OSError as error:
        raise InputError(
            f"the data file '{path}' cannot be read ({reason(error)}); check the file and its "
            "permissions"
        ) from error
    if not table.rows:
        raise InputError(f"the data file '{path}' holds no rows; add queries to it")
    return table


def read_rows(rows: list[Any], query_column: str, label: str = "data.rows") -> Table:
    """Take rows that are no file: strings or mappings.

    Args:
        rows: the rows, as a recipe or a Python program has them.
        query_column: column that a string stands for.
        label: what error messages call the rows.

    Raises:
        InputError: There are none, or one is neither a string nor a mapping.
    """
    if not rows:
        raise InputError(f"{label} is empty; write at least one query or give a path")
    checked = [_as_row(row, query_column, f"{label} row {i + 1}") for i, row in enumerate(rows)]
    return Table(label=label, rows=checked)


_ARRAY_HINT = "if it holds one JSON array of rows, rename it to end in .json"


def _read_jsonl(file: Path, query_column: str) -> Table:
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    for number, line in _lines(file):
        if not line.strip():
            continue
        where = f"{file.name} line {number}"
        begins_array = not rows and line.lstrip().startswith("[")
        try:
            value = json_text.loads(line.rstrip())
        except JSONDecodeError as error:
            raise InputError(
                f"{where} is not valid JSON ({error.msg} at column {error.colno}); "
                f"{_ARRAY_HINT if begins_array else 'write one JSON object per line'}"
            ) from error
        if begins_array and isinstance(value, list):
            raise InputError(f"{where} is a list, not one row; {_ARRAY_HINT}")
        rows.append(_as_row(value, query_column, where))
        numbers.append(number)
    return Table(label=file.name, rows=rows, unit="line", numbers=numbers)


def _read_json(file: Path, query_column: str) -> Table:
    text = "".join(line for _, line in _lines(file))
    try:
        value = json_text.loads(text)
    except JSONDecodeError as error:
        advice = "mend it there"
        if error.msg == "Extra data":
            advice = "if it holds one JSON object per line, rename it to end in .jsonl"
        raise InputError(
            f"{file.name} line {error.lineno} is not valid JSON ({error.msg} at column "
            f"{error.colno}); {advice}"
        ) from error
    if not isinstance(value, list):
        raise InputError(
            f"{file.name} holds a JSON {_kind(value)} at its top; it must be a list of rows"
        )
    rows = [_as_row(row, query_column, f"{file.name} row {i + 1}") for i, row in enumerate(value)]
    return Table(label=file.name, rows=rows)


def _read_csv(file: Path, query_column: str) -> Table:
    del query_column  # the header names every column
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    # Python's own limit of 131,072 characters is process-wide, and says nothing of CSV.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        header = next(reader, [])
        doubled = sorted({name for name in header if header.count(name) > 1})
        if doubled:
            raise InputError(
                f"{file.name} names the column '{doubled[0]}' twice in its header; rename one"
            )
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{file.name} line {reader.line_num} has {len(cells)} cells where the header "
                    f"has {len(header)}; put quotes around a cell that holds a comma"
                )
            rows.append(dict(zip(header, cells, strict=True)))
            numbers.append(reader.line_num)
    except csv.Error as error:
        raise InputError(
            f"{file.name} line {reader.line_num} is not valid CSV ({error}); mend it there"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return Table(label=file.name, rows=rows, unit="line", numbers=numbers)


def _read_parquet(file: Path, query_column: str) -> Table:
    del query_column  # the schema names every column
    import pyarrow
    import pyarrow.parquet

    require_regular(file)
    try:
        metadata = pyarrow.parquet.read_metadata(file)
        groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
        size = sum(group.total_byte_size for group in groups)
        if size > DATA_BYTES:
            raise InputError(
                f"{file.name} unpacks to {in_words(size)}, at most {in_words(DATA_BYTES)} are "
                "read; divide it"
            )
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except InputError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError, MemoryError) as error:
        why = shorten(str(error), 200)
        raise InputError(
            f"{file.name} cannot be read as Parquet ({why}); write the file again"
        ) from error
    return Table(label=file.name, rows=rows)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line), the byte-order mark that spreadsheets write left out."""
    # Only line feeds divide lines: a query may hold U+2028, which str.splitlines would cut at.
    for number, raw in enumerate(read_bytes(file, DATA_BYTES).split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file.name} line {number} is not UTF-8 text; save the file with UTF-8 encoding"
            ) from error
        yield number, line + "\n"


def _as_row(value: Any, query_column: str, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {query_column: value}
    if not isinstance(value, dict):
        raise InputError(
            f"{where} is a {_kind(value)}; a row must be text or a mapping of columns to values"
        )
    for name in value:
        if not isinstance(name, str):
            raise InputError(
                f"{where} has the column name {name!r}, which is not text; put it in quotes"
            )
    return value


def _kind(value: Any) -> str:
    """Name a value's type in the words of JSON and YAML."""
    kinds = {dict: "mapping", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number" if isinstance(value, int | float) else "value")


def _types() -> str:
    return ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"


def _missing_message(path: str, file: Path) -> str:
    folder = file.parent
    if not folder.is_dir():
        return (
            f"the data file '{path}' does not exist, nor does its folder {folder}; paths are "
            "relative to the recipe's folder"
        )
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    near = difflib.get_close_matches(file.name, names, n=3, cutoff=0.5)
    near = near or [name for name in names if name.lower().endswith(SUFFIXES)][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else "no data file is there"
    return (
        f"the data file '{path}' does not exist in {folder}; {hint} (paths are relative to the "
        "recipe's folder)"
    )
