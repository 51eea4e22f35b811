"""The decode cache: keys and values of the rows that are still decoding.

Columns: [prefix | query, right-aligned | completion], so that all rows write the same column at the
same time. A layer's keys are handed out whole, unwritten columns included: a slice of them would be
copied by every matrix product, and hiding a few columns by the mask costs nothing. Memory therefore
grows in small blocks.

Layers that attend in the C++ kernels use memory of the same size in another way: a row's columns
are [prefix | query | completion] with nothing between, in the order in which the kernels multiply
them (`rlprompt.kernels.cpu.cache_layout`), so that a step moves nothing. Where all layers do,
whole blocks of columns that the rows of a group share stand in one row of the group only, its
leader: the memory of the others is never touched there.

Where rows are decoded under several prompts at once, what stands above of a query is said of a
prefix with its query, and the prefix that all rows share has no columns.

Letters: B rows, G groups, L layers, H heads, H_kv key/value heads, P prefix tokens, Q padded query
length, S columns, D head dim.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from rlprompt.kernels.cpu.cache_layout import LANES, lay_out_keys, lay_out_values
from rlprompt.kernels.cpu.ops import decode_attention
from rlprompt.kernels.dispatch import fused_decode
from rlprompt.kernels.operands import KeyValue, Packed, Spans
from rlprompt.kernels.reference import mask_bias
from rlprompt.model.forward.attention import LayerCall
from rlprompt.types import PrefixKV

_BLOCK, _CPP_BLOCK = 32, 128
"""Columns by which memory grows; all of it is copied then, once in so many tokens. The C++ kernels
neither read nor clear columns before they are written, so that larger blocks cost them nothing."""


class Prefilled(Protocol):
    """What a prefill leaves: keys and values of G queries, or of prefixes with their queries."""

    @property
    def mask(self) -> Tensor:
        """Their tokens, bool [G, Q], right-padded."""
        ...

    @property
    def query_keys(self) -> Iterable[Tensor]:
        """Each layer's keys, [G, H_kv, Q, D], right-padded."""
        ...

    @property
    def query_values(self) -> Iterable[Tensor]:
        """Each layer's values, as `query_keys`."""
        ...

    @property
    def cpp_layers(self) -> Collection[int]:
        """Layers whose attention runs in the C++ kernels."""
        ...


class AttendedCache(Protocol):
    """What attention asks of a cache: the columns of its B rows, and to write one more."""

    @property
    def dtype(self) -> torch.dtype:
        """What keys and values are stored in."""
        ...

    @property
    def prefix_tokens(self) -> int:
        """Columns at the front that are equal in all rows."""
        ...

    def reserve(self) -> None:
        """Make room for the column about to be written."""
        ...

    def positions(self) -> Tensor:
        """Absolute position [B] of the column about to be written."""
        ...

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [B, H_kv, S, D], views."""
        ...

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write the column of every row, [B, H_kv, D] each, in a layer without the C++ layout."""
        ...

    def has_cpp_layout(self, layer: int) -> bool:
        """Whether a layer's columns stand as the C++ kernels read them; `attend` writes them."""
        ...

    def attend(self, layer: int, new: Packed, scaling: float) -> Tensor:
        """Write the column and attend, by the C++ kernel; see `decode_attention`."""
        ...

    def seen(self, window: int | None) -> Tensor:
        """The columns that the token about to be written may see, bool [B, 1, S]."""
        ...

    def spans(self) -> Spans:
        """The columns behind the prefix that each row sees, the one to be written included."""
        ...


class StepCache(AttendedCache, Protocol):
    """What a decode step in one call asks beside: where everything stands."""

    @property
    def block(self) -> int:
        """What the number of rows is always a multiple of."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows still decoding."""
        ...

    @property
    def data(self) -> Tensor:
        """The whole block, [2 L, at least B, H_kv, S, D]: keys of all layers, then values."""
        ...

    @property
    def table(self) -> Tensor:
        """Padding and leader of each row; see `decode_attention`."""
        ...

    @property
    def shared(self) -> int:
        """Columns that a row without padding may read in its leader."""
        ...

    @property
    def column(self) -> int:
        """The column that a row without padding writes next."""
        ...


class DecodeCache:
    """Keys and values of B rows in one block of memory, and which columns each row sees."""

    block = 1
    """Any number of rows."""

    def __init__(self, context: Prefilled, prefix: PrefixKV, copies: int, max_tokens: int) -> None:
        """Lay out prefix and queries for `copies` rows per group.

        Args:
            context: the prefill's context, which has kept query keys and values.
            prefix: the prefix of all rows; one of no tokens where each query has its own before it.
            copies: completions per group.
            max_tokens: tokens of the longest completion.
        """
        mask = context.mask
        groups, width = mask.shape
        self.prefix_tokens = prefix.num_tokens
        self.column = self.prefix_tokens + width
        self._rows = groups * copies
        padding = (width - mask.sum(1)).repeat_interleave(copies)
        group = torch.arange(groups, device=mask.device).repeat_interleave(copies)
        self._table = torch.stack([padding, group * copies])
        self._group = group
        self._shared = self.column
        self._most_columns = self.column + max_tokens
        like = next(iter(context.query_keys))
        kv_heads, _, dim = prefix.keys[0].shape
        layers = len(prefix.keys)
        self._cpp_layers = frozenset(context.cpp_layers)
        self._all_cpp = len(self._cpp_layers) == layers
        if self._cpp_layers:
            self._most_columns = _whole(self._most_columns)
        self._led = 0
        """Columns that stand in leaders only."""
        if self._all_cpp:
            self._led = int(self.column - padding.max()) // LANES * LANES
        self._data = self._room(like, 2 * layers, self._rows, kv_heads, dim)
        fronts = [*prefix.keys, *prefix.values]
        backs = chain(context.query_keys, context.query_values)
        to_the_right = _right_aligned(mask)[:, None, :, None].expand(-1, kv_heads, -1, dim)
        for part, (front, back) in enumerate(zip(fronts, backs, strict=True)):
            for_cpp = part % layers in self._cpp_layers
            query = back if for_cpp else back.gather(2, to_the_right)
            columns = torch.cat([front.to(like.dtype).expand(groups, -1, -1, -1), query], 2)
            if for_cpp:
                columns = functional.pad(columns, (0, 0, 0, _whole(self.column) - self.column))
                columns = (lay_out_keys if part < layers else lay_out_values)(columns)
            led = self._led
            self._data[part, ::copies, :, :led] = columns[:, :, :led]
            own = columns[:, :, led:].repeat_interleave(copies, 0)
            self._data[part, :, :, led : columns.shape[2]] = own

    @property
    def dtype(self) -> torch.dtype:
        """What keys and values are stored in."""
        return self._data.dtype

    @property
    def padding(self) -> Tensor:
        """int64 [B or more], unseen columns between prefix and query."""
        return self._table[0]

    @property
    def num_rows(self) -> int:
        """Rows still decoding."""
        return self._rows

    def _capacity(self) -> int:
        """Columns to hold from now on: whole blocks, at most what the longest row needs."""
        block = _CPP_BLOCK if self._all_cpp else _BLOCK
        return min(self._most_columns, (self.column // block + 1) * block)

    def _room(self, like: Tensor, parts: int, rows: int, kv_heads: int, dim: int) -> Tensor:
        """Memory for the present capacity, [2 L = parts, B, H_kv, S, D]."""
        make = like.new_empty if self._all_cpp else like.new_zeros
        return make(parts, rows, kv_heads, self._capacity(), dim)

    def reserve(self) -> None:
        """Make room for the column about to be written."""
        if self.column < self._data.shape[3]:
            return
        parts, rows, kv_heads, columns, dim = self._data[:, : self._rows].shape
        grown = self._room(self._data, parts, rows, kv_heads, dim)
        led, leaders = self._led, torch.unique(self._table[1, :rows])
        grown[:, :, :, led:columns] = self._data[:, :rows, :, led:]
        grown[:, leaders, :, :led] = self._data[:, leaders, :, :led]
        self._data = grown

    def advance(self) -> None:
        """Go on to the next column, after one has been written."""
        self.column += 1

    def positions(self) -> Tensor:
        """Absolute position [B] of the column about to be written."""
        return self.column - self.padding[: self._rows]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [B, H_kv, S, D], contiguous views.

        See `has_cpp_layout` for their order, and for columns that stand in leaders only.
        """
        layers = self._data.shape[0] // 2
        return self._data[layer, : self._rows], self._data[layers + layer, : self._rows]

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write the column of every row, [B, H_kv, D] each, in a layer without the C++ layout."""
        keys, values = self.layer(layer)
        keys[:, :, self.column] = key
        values[:, :, self.column] = value

    def has_cpp_layout(self, layer: int) -> bool:
        """Whether a layer's columns stand as the C++ kernels read them; `attend` writes them.

        Whole blocks of a group's shared columns may then stand in the row of its leader only.
        """
        return layer in self._cpp_layers

    @property
    def data(self) -> Tensor:
        """The whole block, [2 L, at least B, H_kv, S, D]: keys of all layers, then values."""
        return self._data

    def attend(self, layer: int, new: Packed, scaling: float) -> Tensor:
        """Write the column and attend, by the C++ kernel; see `decode_attention`."""
        table, shared = self._table, self._shared
        return decode_attention(new, self._data, layer, table, shared, self.column, scaling)

    @property
    def table(self) -> Tensor:
        """Padding and leader of each row; see `decode_attention`."""
        return self._table

    @property
    def shared(self) -> int:
        """Columns of prefix and query in a row with the longest query; see `decode_attention`."""
        return self._shared

    def seen(self, window: int | None) -> Tensor:
        """The columns that the token about to be written may see, bool [B, 1, S]."""
        columns, padding = self._data.shape[3], self.padding[: self._rows]
        return seen_columns(columns, padding, self.column, self.prefix_tokens, window)

    def spans(self) -> Spans:
        """The columns behind the prefix that each row sees, the one to be written included."""
        return own_spans(self.padding[: self._rows], self.column, self.prefix_tokens)

    def drop(self, finished: Tensor) -> Tensor:
        """Drop finished rows: the last rows that go on move into their places.

        Args:
            finished: bool [B].

        Returns:
            int64: which of the present rows stand where from now on.
        """
        remaining = int((~finished).sum())
        order = torch.arange(self._rows, device=finished.device)
        holes = torch.nonzero(finished[:remaining]).flatten()
        movers = remaining + torch.nonzero(~finished[remaining:]).flatten()
        order[holes] = movers
        leaders = _leaders(self._group[order[:remaining]])
        self._hand_over(order, torch.unique(leaders))
        if holes.numel():
            filled = min(_whole(self.column), self._data.shape[3])
            own = slice(self._led, filled)
            self._data[:, holes, :, own] = self._data[:, movers, :, own]
            self._table[0, holes] = self._table[0, movers]
            self._group[holes] = self._group[movers]
        self._rows = remaining
        self._table[1, :remaining] = leaders
        return order[:remaining]

    def _hand_over(self, order: Tensor, leaders: Tensor) -> None:
        """Give the columns that stand in leaders only to those who lead after a drop.

        Args:
            order: int64, which of the present rows stand where.
            leaders: int64, rows in that order.
        """
        before = self._table[1, order[leaders]]
        moved = leaders != before
        if self._led and bool(moved.any()):
            led = slice(self._led)
            self._data[:, leaders[moved], :, led] = self._data[:, before[moved], :, led]


def seen_columns(
    columns: int, padding: Tensor, column: int | Tensor, prefix_tokens: int, window: int | None
) -> Tensor:
    """Which columns the token about to be written may see, where a row's padding stands unseen.

    Args:
        columns: the columns that are held, S.
        padding: int64 [B], unseen columns between prefix and query.
        column: the column about to be written; a tensor [1] where it is known on the device only.
        prefix_tokens: the columns of the prefix.
        window: the sliding window; None = all positions are seen.

    Returns:
        Bool [B, 1, S].
    """
    place = torch.arange(columns, device=padding.device)[None]
    padding = padding[:, None]
    hidden = (place >= prefix_tokens) & (place < prefix_tokens + padding)
    seen = ~hidden & (place <= column)
    if window is not None:
        positions = torch.where(place < prefix_tokens, place, place - padding)
        seen = seen & (column - padding - positions < window)
    return seen[:, None]


def own_spans(padding: Tensor, column: int | Tensor, prefix_tokens: int) -> Spans:
    """The same columns behind the prefix as ranges; arguments as of `seen_columns`."""
    firsts = padding.int()
    lengths = column + 1 - prefix_tokens - firsts
    return Spans(firsts, lengths.int())


class DecodeContext:
    """Attention of one new token per row over its cache."""

    products = None

    def __init__(self, cache: AttendedCache, fused: bool | None = None) -> None:
        """Attend over `cache`, whose `column` is written by this forward.

        Args:
            cache: keys and values of the rows.
            fused: whether attention goes through the Triton kernels; None = as the device suggests.
        """
        cache.reserve()
        self._cache = cache
        self._fused = fused
        self._spans: Spans | None = None
        self._biases: dict[int | None, Tensor] = {}

    def attend(self, call: LayerCall) -> Tensor:
        """Write the column, then attend: packed [1, H, B, D] in and out."""
        cache = self._cache
        if cache.has_cpp_layout(call.layer):
            new = Packed(*(t[0].transpose(0, 1) for t in (call.query, call.key, call.value)))
            out = cache.attend(call.layer, new, call.scaling)
            return out.transpose(0, 1)[None]
        cache.write(call.layer, call.key[0].transpose(0, 1), call.value[0].transpose(0, 1))
        key, value = cache.layer(call.layer)
        fused = self._fused
        if fused is None:
            fused = call.is_fused("decode")
        if fused:
            return self._attend_fused(call, key, value)
        query = call.query[0].transpose(0, 1)[:, :, None]  # [B, H, 1, D]
        out = call.attend(query, key, value, self._bias(call.window))
        return out.squeeze(2).transpose(0, 1)[None]

    def _attend_fused(self, call: LayerCall, key: Tensor, value: Tensor) -> Tensor:
        """The prefix is read from the first row, for all rows at once."""
        cache, shared = self._cache, self._cache.prefix_tokens
        if self._spans is None:
            self._spans = cache.spans()
        own = KeyValue(key[:, :, shared:], value[:, :, shared:])
        prefix = KeyValue(key[0, :, :shared], value[0, :, :shared])
        query = call.query[0].transpose(0, 1)
        out = fused_decode(query, own, prefix, self._spans, call.scoring)
        return out.transpose(0, 1)[None]

    def _bias(self, window: int | None) -> Tensor:
        if window not in self._biases:
            self._biases[window] = mask_bias(self._cache.seen(window), self._cache.dtype)
        return self._biases[window]


def _leaders(group: Tensor) -> Tensor:
    """The first row of each row's group, int64 [B]."""
    if group.numel() == 0:
        return group
    return (group[:, None] == group[None, :]).int().argmax(1)


def _whole(columns: int) -> int:
    """As many columns or a few more: blocks of the kernels'."""
    return -(-columns // LANES) * LANES


def _right_aligned(mask: Tensor) -> Tensor:
    """Gather index [G, Q] that moves right-padded rows to the right edge."""
    width = mask.shape[1]
    shift = width - mask.sum(1, keepdim=True)
    return (torch.arange(width, device=mask.device)[None] - shift).clamp_min(0)
