"""The header of a GGUF file (versions 2 and 3 of ggml's format) that may say anything.

The format is a list of typed values, a table of tensors, and their bytes. Every count in it is a
claim: nothing is allocated for one before the file has been seen to hold it. Refused are sizes and
nesting that no model has, keys and tensors that stand twice, and tensors that overlap, lie outside
of the file or are cut short. Tensors are read in pieces, from a file that is never mapped: one that
shrinks meanwhile is an error, not a signal.

Source: the description of the format in the ggml project, and the sizes of its blocks.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlprompt.reading.files import TEXT_BYTES, in_words, open_regular

HEADER_BYTES = 256 << 20
"""Most that values and table may take; those of a vocabulary of 262,144 tokens take 20 MB."""
MOST_VALUES = 10_000
"""Keys that a file may have."""
MOST_TENSORS = 100_000
MOST_ITEMS = 4_000_000
"""Items that one list may have."""
NAME_BYTES = 1 << 16
"""Most that a key may have; for the name of a tensor ggml allows 64."""
TENSOR_NAME_BYTES = 256
MOST_AXES = 4
LARGEST_AXIS = 1 << 32

BLOCKS: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
"""Number of a storage type -> its name, numbers in a block, bytes of a block."""

_MAGIC = b"GGUF"
_STRING, _LIST = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Number of a value's type -> its letter for `struct`."""


class GgufError(ValueError):
    """A file that is no whole GGUF file; the text says what is wrong, for a sentence."""


@dataclass(frozen=True)
class GgufTensor:
    """A line of the table of tensors."""

    name: str
    shape: tuple[int, ...]
    """Axes as torch counts them: rows first, the numbers of a row last."""
    kind: str
    """Storage type, a name of `BLOCKS`."""
    start: int
    """Byte of the file where it begins."""
    row_bytes: int
    num_rows: int

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return self.row_bytes * self.num_rows


class GgufFile:
    """An open GGUF file: its values, and its tensors by name.

    Args:
        path: path of the file.

    Raises:
        OSError: it is not there or cannot be read, or is no regular file.
        GgufError: it is damaged, or of another version of the format.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file: BufferedReader = open(open_regular(path), "rb")  # noqa: SIM115
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            header = _Header(self._file, self.size)
            self.values: Mapping[str, Any] = header.values
            """Key -> number, text, or list of these."""
            self.tensors: Mapping[str, GgufTensor] = _placed(header, self.size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def rows(self, tensor: GgufTensor, most_bytes: int) -> Iterator[bytes]:
        """The bytes of a tensor, in pieces of whole rows.

        Args:
            tensor: one of `tensors`.
            most_bytes: size of a piece, at least one row.

        Raises:
            OSError: the file cannot be read.
            GgufError: it has become shorter.
        """
        step = max(1, most_bytes // max(1, tensor.row_bytes)) * tensor.row_bytes
        end = tensor.start + tensor.num_bytes
        for place in range(tensor.start, end, step):
            wanted = min(step, end - place)
            self._file.seek(place)
            piece = self._file.read(wanted)
            if len(piece) != wanted:
                raise GgufError(f"it has become shorter while its tensor {tensor.name} was read")
            yield piece

    def digest_source(self) -> BufferedReader:
        """The file at its first byte, for a hash of all of it."""
        self._file.seek(0)
        return self._file


class _Header:
    """Values and table, read from the first byte on."""

    def __init__(self, file: BufferedReader, size: int) -> None:
        self._file = file
        self._left = min(size, HEADER_BYTES)
        self._whole = size <= HEADER_BYTES
        if self._take(4, "its first four bytes") != _MAGIC:
            raise GgufError("it does not begin with the letters GGUF")
        version = self._number("I", "its version")
        if version not in (2, 3):
            raise GgufError(_version(version))
        num_tensors = self._count("Q", MOST_TENSORS, 24, "tensors")
        num_values = self._count("Q", MOST_VALUES, 13, "values")
        self.values = self._read_values(num_values)
        self.table = [self._line() for _ in range(num_tensors)]
        self.alignment = _alignment(self.values)
        here = file.tell()
        self.data_start = here + -here % self.alignment

    def _take(self, count: int, what: str) -> bytes:
        if count > self._left and not self._whole:
            raise GgufError(f"its header would have more than {in_words(HEADER_BYTES)}")
        taken = self._file.read(count) if count <= self._left else b""
        if len(taken) != count:
            raise GgufError(f"it ends in {what}")
        self._left -= count
        return taken

    def _number(self, letter: str, what: str) -> int:
        (value,) = struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}"), what))
        return int(value)

    def _count(self, letter: str, most: int, least_bytes: int, what: str) -> int:
        """A number of things to come, of which each takes so many bytes at least."""
        count = self._number(letter, f"the number of its {what}")
        if count > most:
            raise GgufError(f"it would have {count:,} {what}, and {most:,} is the most")
        if count * least_bytes > self._left:
            raise GgufError(f"it would have {count:,} {what}, and is too short for them")
        return count

    def _text(self, most: int, what: str) -> str:
        length = self._number("Q", what)
        if length > most:
            raise GgufError(f"{what} would have {length:,} bytes, and {most:,} is the most")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise GgufError(f"{what} is not UTF-8 text") from error

    def _read_values(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self._text(NAME_BYTES, "a key")
            if key in values:
                raise GgufError(f"the key {key[:80]!r} stands twice")
            values[key] = self._value(self._number("I", f"the value of {key[:80]!r}"), key)
        return values

    def _value(self, kind: int, key: str) -> Any:
        what = f"the value of {key[:80]!r}"
        if kind == _STRING:
            return self._text(TEXT_BYTES, what)
        if kind in _SCALARS:
            (value,) = struct.unpack(
                f"<{_SCALARS[kind]}", self._take(struct.calcsize(f"<{_SCALARS[kind]}"), what)
            )
            return value
        if kind != _LIST:
            raise GgufError(f"{what} is of the type {kind}, which the format does not have")
        inner = self._number("I", what)
        if inner == _STRING:
            count = self._count("Q", MOST_ITEMS, 8, f"items in {key[:80]!r}")
            return [self._text(NAME_BYTES, f"an item of {key[:80]!r}") for _ in range(count)]
        if inner not in _SCALARS:
            raise GgufError(f"{what} is a list of the type {inner}, which no model has")
        letter = _SCALARS[inner]
        width = struct.calcsize(f"<{letter}")
        count = self._count("Q", MOST_ITEMS, width, f"items in {key[:80]!r}")
        return list(struct.unpack(f"<{count}{letter}", self._take(count * width, what)))

    def _line(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, axes as the file counts them, storage type and offset of a tensor."""
        name = self._text(TENSOR_NAME_BYTES, "the name of a tensor")
        what = f"the table's line of {name[:80]!r}"
        num_axes = self._number("I", what)
        if not 1 <= num_axes <= MOST_AXES:
            raise GgufError(f"the tensor {name[:80]!r} would have {num_axes} axes")
        axes = tuple(self._number("Q", what) for _ in range(num_axes))
        if not all(1 <= axis <= LARGEST_AXIS for axis in axes):
            raise GgufError(f"the tensor {name[:80]!r} would have the shape {list(axes)}")
        return name, axes, self._number("I", what), self._number("Q", what)


def _version(version: int) -> str:
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (2, 3):
        return "it was written for big-endian machines"
    return f"it has version {version} of the format, and 2 and 3 can be read"


def _alignment(values: Mapping[str, Any]) -> int:
    alignment = values.get("general.alignment", 32)
    fits = isinstance(alignment, int) and 8 <= alignment <= 1 << 20
    if not fits or alignment & (alignment - 1):
        raise GgufError(f"general.alignment is {str(alignment)[:40]}, not a power of two from 8 on")
    return int(alignment)


def _placed(header: _Header, size: int) -> dict[str, GgufTensor]:
    """The table with places in the file, once none overlaps another or lies outside."""
    found: dict[str, GgufTensor] = {}
    for name, axes, number, offset in header.table:
        if name in found:
            raise GgufError(f"the tensor {name!r} stands twice")
        if number not in BLOCKS:
            raise GgufError(f"the tensor {name!r} is stored as type {number}, which is not known")
        kind, in_block, block_bytes = BLOCKS[number]
        if axes[0] % in_block:
            raise GgufError(
                f"the tensor {name!r} has rows of {axes[0]} numbers, no multiple of the "
                f"{in_block} of a block of {kind}"
            )
        if offset % header.alignment:
            raise GgufError(f"the tensor {name!r} begins at {offset}, between aligned places")
        rows, row_bytes = math.prod(axes[1:]), axes[0] // in_block * block_bytes
        start = header.data_start + offset
        if start + rows * row_bytes > size:
            raise GgufError(f"it ends before its tensor {name!r} does")
        found[name] = GgufTensor(name, tuple(reversed(axes)), kind, start, row_bytes, rows)
    in_order = sorted(found.values(), key=lambda tensor: tensor.start)
    for one, two in itertools.pairwise(in_order):
        if one.start + one.num_bytes > two.start:
            raise GgufError(f"its tensors {one.name!r} and {two.name!r} overlap")
    return found
