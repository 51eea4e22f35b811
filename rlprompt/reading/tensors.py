"""Tensors of a safetensors file whose header may say anything.

The library refuses what does not hold together. Refused here as well: a header or file of a size
that no prompt has, element types that nothing of ours is stored in, and names that stand twice.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlprompt.reading import json_text
from rlprompt.reading.files import DATA_BYTES, UnreadableError, in_words, read_bytes

if TYPE_CHECKING:  # the ground must be there without torch
    from torch import Tensor

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Element types, in the words of the format, that a prompt may have."""
STORED = FLOATS | {"I64", "I32", "I16", "I8", "U8", "BOOL"}
"""Element types that a checkpoint may have."""

_HEADER_BYTES = 8 << 20
_LENGTH = struct.Struct("<Q")
_MEMORY_SHARE = 4  # the file and its tensors are in memory together, and not alone


def read_tensors(path: Path, types: Collection[str] = FLOATS) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Args:
        path: path of the file.
        types: element types that it may have.

    Raises:
        OSError: it cannot be read, or is too large.
        ValueError: it is damaged, or holds other types; the text says what is wrong.
    """
    return parse_tensors(read_bytes(path, _most_bytes()), types)


def parse_tensors(content: bytes, types: Collection[str] = FLOATS) -> dict[str, Tensor]:
    """The tensors of a file's content; see `read_tensors`.

    Raises:
        ValueError: it is damaged, or holds other types.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    for name, described in _header(content).items():
        kind = described.get("dtype") if isinstance(described, dict) else None
        if name != "__metadata__" and kind not in types:
            raise ValueError(
                f"tensor {name[:80]!r} is of the type {str(kind)[:20]}, not one of "
                f"{', '.join(sorted(types))}"
            )
    try:
        tensors: dict[str, Tensor] = load(content)
    except (SafetensorError, LookupError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    return tensors


def _header(content: bytes) -> Mapping[str, Any]:
    """Name -> type, shape and place."""
    if len(content) < _LENGTH.size:
        raise ValueError(f"it has {len(content)} bytes, too few for a header")
    (length,) = _LENGTH.unpack_from(content)
    if length > min(_HEADER_BYTES, len(content) - _LENGTH.size):
        raise ValueError(f"its header would have {length} bytes")
    try:
        header = json_text.loads(content[_LENGTH.size : _LENGTH.size + length])
    except ValueError as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header


def _most_bytes() -> int:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(DATA_BYTES, memory // _MEMORY_SHARE)


def require_size(path: Path) -> None:
    """Refuse a file of tensors that a library is about to read and that does not fit in memory.

    Raises:
        UnreadableError: it has more bytes than this machine has memory.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = path.stat().st_size
    if size > memory:
        raise UnreadableError(0, f"it has {in_words(size)}, memory {in_words(memory)}", str(path))
