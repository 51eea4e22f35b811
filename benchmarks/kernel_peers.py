"""What the prefix-attention kernels are compared with: three ways to do the same in plain PyTorch.

Each takes rows of equal length and returns a function to time. Block masks are made beforehand, as
all layers share them. In decoding, so are copied or packed keys, as a cache would hold them so.

Letters: B rows, T own tokens (for decoding: own columns, the query is one token), P prefix tokens,
H heads, H_kv key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention


class Rows(NamedTuple):
    """One problem."""

    query: Tensor
    """[B, H, Q, D]; Q is T in training and 1 in decoding."""
    key: Tensor
    """[B, H_kv, T, D]."""
    value: Tensor
    prefix_key: Tensor
    """[H_kv, P, D]."""
    prefix_value: Tensor

    @property
    def decodes(self) -> bool:
        return self.query.shape[2] == 1


Flex = Callable[..., Any]
"""flex_attention, compiled where that is possible."""
Run = Callable[[], Tensor]
"""Gives [B, H, Q, D]."""
Pair = tuple[Tensor, Tensor]


def plain_flex(*args: Any, **kwargs: Any) -> Any:
    """FlexAttention without compilation: right anywhere, fast nowhere."""
    return flex_attention(*args, **kwargs)


def laid_out(rows: Rows, make: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Pair]:
    """Keys and values by `make(prefix, own)`: at each call, or once where a cache holds them."""

    def both() -> Pair:
        return make(rows.prefix_key, rows.key), make(rows.prefix_value, rows.value)

    if not rows.decodes:
        return both
    held = both()
    return lambda: held


def concat(rows: Rows, flex: Flex) -> Run:
    """(a) Each row gets a copy of the prefix, as PEFT does it; SDPA picks FlashAttention."""
    batch, _, queries, _ = rows.query.shape

    def copied(shared: Tensor, own: Tensor) -> Tensor:
        return torch.cat([shared[None].expand(batch, -1, -1, -1), own], 2)

    keys_and_values = laid_out(rows, copied)
    total = rows.prefix_key.shape[1] + rows.key.shape[2]
    mask = causal_lower_right(queries, total) if queries > 1 else None

    def run() -> Tensor:
        key, value = keys_and_values()
        return scaled_dot_product_attention(rows.query, key, value, attn_mask=mask, enable_gqa=True)

    return run


def broadcast(rows: Rows, flex: Flex) -> Run:
    """(b) FlexAttention over one list of keys, [prefix | row 0 | row 1 | ...], and a block mask."""
    batch, _, queries, _ = rows.query.shape
    tokens, prefix = rows.key.shape[2], rows.prefix_key.shape[1]

    def packed(shared: Tensor, own: Tensor) -> Tensor:
        return torch.cat([shared, own.transpose(0, 1).flatten(1, 2)], 1)[None]

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        place = k - prefix
        own = (place // tokens == b) & (place % tokens <= q + tokens - queries)
        return (place < 0) | own

    keys_and_values = laid_out(rows, packed)
    mask = create_block_mask(
        seen, batch, None, queries, prefix + batch * tokens, device=str(rows.query.device)
    )

    def run() -> Tensor:
        key, value = (t.expand(batch, -1, -1, -1) for t in keys_and_values())
        out: Tensor = flex(rows.query, key, value, block_mask=mask, enable_gqa=True)
        return out

    return run


def merge(rows: Rows, flex: Flex) -> Run:
    """(c) One call for the prefix, with all rows' queries, one for own keys; merged by their LSE.

    FlexAttention for both, because its LSE has a gradient.
    """
    batch, heads, queries, dim = rows.query.shape
    tokens = rows.key.shape[2]

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q + tokens - queries

    mask = create_block_mask(causal, None, None, queries, tokens, device=str(rows.query.device))
    options = {"enable_gqa": True, "return_lse": True}

    def run() -> Tensor:
        folded = rows.query.transpose(0, 1).reshape(1, heads, batch * queries, dim)
        prefix = (rows.prefix_key[None], rows.prefix_value[None])
        shared, shared_lse = flex(folded, *prefix, **options)
        own, own_lse = flex(rows.query, rows.key, rows.value, block_mask=mask, **options)
        shared = shared.view(heads, batch, queries, dim).transpose(0, 1)
        shared_lse = shared_lse.view(heads, batch, queries).transpose(0, 1)
        weight = torch.sigmoid(shared_lse - own_lse)[..., None].to(own.dtype)
        merged: Tensor = own + weight * (shared - own)
        return merged

    return run


PEERS: dict[str, Callable[[Rows, Flex], Run]] = {
    "concat": concat,
    "broadcast": broadcast,
    "merge": merge,
}
