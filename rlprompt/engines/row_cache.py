"""The cache of rows that join and leave one by one, each at a length of its own.

A row's columns are its tokens from the first one on, [prefix | query | completion], with nothing
between or before: `engines.cache` says why some layers hold them in another order. Memory grows in
whole blocks of columns and rows, and only the columns that are used are ever copied.

Letters: B rows, G joining rows, L layers, H_kv key/value heads, W columns of the longest joining
row, S columns, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rlprompt.engines.cache import Prefilled
from rlprompt.kernels.cpu.cache_layout import LANES, lay_out_keys, lay_out_values
from rlprompt.kernels.cpu.ops import decode_attention
from rlprompt.kernels.operands import Packed, Spans

_COLUMNS, _ROWS = 128, 8
"""What memory grows by."""


class RowCache:
    """Keys and values of B rows of different lengths; see `engines.cache.StepCache`."""

    prefix_tokens = 0
    """No column is known to be equal in all rows."""

    def __init__(self, block: int = 1) -> None:
        """Begin without rows, and without memory.

        Args:
            block: rows that steps are made of: the last ones may be rows of one column, which
                nobody reads.
        """
        self.block = block
        self._data: Tensor | None = None
        self._cpp_layers: frozenset[int] = frozenset()
        self._lengths: list[int] = []
        self._positions: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Rows of a step: those still decoding, up to whole blocks."""
        return _whole(len(self._lengths), self.block)

    @property
    def data(self) -> Tensor:
        """The whole block, [2 L, at least B, H_kv, S, D]: keys of all layers, then values."""
        if self._data is None:
            raise ValueError("the cache has no rows; let some join first")
        return self._data

    @property
    def dtype(self) -> torch.dtype:
        """What keys and values are stored in."""
        return self.data.dtype

    @property
    def column(self) -> int:
        """The column that the longest row writes next."""
        return max(self._lengths)

    @property
    def shared(self) -> int:
        """Columns that a row may read in its leader, which is itself."""
        return self.column

    @property
    def table(self) -> Tensor:
        """How much shorter each row is than the longest one, and the row itself, int64 [2, B]."""
        padding = self.column - self.positions()
        return torch.stack([padding, torch.arange(self.num_rows, device=padding.device)])

    def positions(self) -> Tensor:
        """Absolute position [B] of the column about to be written."""
        if self._positions is None:
            lengths = [*self._lengths, *[0] * (self.num_rows - len(self._lengths))]
            self._positions = torch.tensor(lengths, device=self.data.device)
        return self._positions

    def join(self, context: Prefilled, copies: Sequence[int]) -> None:
        """Take rows in, behind those that are there.

        Args:
            context: the prefill of G rows, which has kept [prefix | query] of each.
            copies: rows to make of each of them.
        """
        mask = context.mask
        lengths = mask.sum(1).tolist()
        which = torch.repeat_interleave(torch.tensor(copies)).to(mask.device)
        first = len(self._lengths)
        self._cpp_layers = frozenset(context.cpp_layers)
        self._lengths += [lengths[place] for place in which.tolist()]
        self._positions = None
        keys, values = list(context.query_keys), list(context.query_values)
        width = _whole(mask.shape[1], LANES)
        self._make_room(keys[0], 2 * len(keys), first, width + 1)
        for part, columns in enumerate([*keys, *values]):
            layer = part % len(keys)
            columns = functional.pad(columns, (0, 0, 0, width - columns.shape[2]))
            if layer in self._cpp_layers:
                columns = (lay_out_keys if part < len(keys) else lay_out_values)(columns)
            self.data[part, first : len(self._lengths), :, :width] = columns[which]

    def drop(self, finished: Sequence[int]) -> list[int]:
        """Drop rows: the last ones that go on move into their places.

        Args:
            finished: the rows to drop.

        Returns:
            Which of the present rows stand where from now on.
        """
        gone = set(finished)
        rows = len(self._lengths)
        order = list(range(rows))
        remaining = rows - len(gone)
        holes = [row for row in range(remaining) if row in gone]
        movers = [row for row in range(remaining, rows) if row not in gone]
        for hole, mover in zip(holes, movers, strict=True):
            used = _whole(self._lengths[mover], LANES)
            self.data[:, hole, :, :used] = self.data[:, mover, :, :used]
            order[hole] = mover
        order = order[:remaining]
        self._lengths = [self._lengths[row] for row in order]
        self._positions = None
        if not order:
            self._data = None  # a long row that has been here is not paid for any more
        return order

    def advance(self) -> None:
        """Go on to the next column of every row, after one has been written."""
        self._lengths = [length + 1 for length in self._lengths]
        self._positions = None

    def reserve(self) -> None:
        """Make room for the column about to be written."""
        self._make_room(self.data, self.data.shape[0], len(self._lengths), self.column + 1)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [B, H_kv, S, D], contiguous views."""
        layers = self.data.shape[0] // 2
        rows = self.num_rows
        return self.data[layer, :rows], self.data[layers + layer, :rows]

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write the column of every row, [B, H_kv, D] each, in a layer without the C++ layout."""
        keys, values = self.layer(layer)
        rows = torch.arange(self.num_rows, device=keys.device)
        keys[rows, :, self.positions()] = key
        values[rows, :, self.positions()] = value

    def has_cpp_layout(self, layer: int) -> bool:
        """Whether a layer's columns stand as the C++ kernels read them; `attend` writes them."""
        return layer in self._cpp_layers

    def attend(self, layer: int, new: Packed, scaling: float) -> Tensor:
        """Write the column and attend, by the C++ kernel; see `decode_attention`."""
        table = self.table
        return decode_attention(new, self.data, layer, table, self.shared, self.column, scaling)

    def seen(self, window: int | None) -> Tensor:
        """The columns that the token about to be written may see, bool [B, 1, S]."""
        positions = self.positions()[:, None]
        place = torch.arange(self.data.shape[3], device=positions.device)[None]
        seen = place <= positions
        if window is not None:
            seen = seen & (positions - place < window)
        return seen[:, None]

    def spans(self) -> Spans:
        """The columns that each row sees, the one to be written included."""
        lengths = self.positions().int() + 1
        return Spans(torch.zeros_like(lengths), lengths)

    def _make_room(self, like: Tensor, parts: int, used_rows: int, columns: int) -> None:
        """Hold all rows, and so many columns of each; `used_rows` of them hold something."""
        old = self._data
        held_rows, held_columns = (0, 0) if old is None else (old.shape[1], old.shape[3])
        if held_rows >= self.num_rows and held_columns >= columns:
            return
        rows = max(held_rows, _whole(self.num_rows, _ROWS))
        columns = max(held_columns, _whole(columns, _COLUMNS))
        kv_heads, dim = like.shape[-3], like.shape[-1]
        # Columns that nobody has written are hidden by a mask, which does not hide a NaN.
        all_cpp = 2 * len(self._cpp_layers) == parts
        make = like.new_empty if all_cpp else like.new_zeros
        self._data = make(parts, rows, kv_heads, columns, dim)
        if old is None:
            return
        for row in range(used_rows):
            used = min(_whole(self._lengths[row], LANES), held_columns)
            self._data[:, row, :, :used] = old[:, row, :, :used]


def _whole(count: int, block: int) -> int:
    """The count, or a little more: whole blocks."""
    return -(-count // block) * block
