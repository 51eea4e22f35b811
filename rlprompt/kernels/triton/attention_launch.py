"""Launching the prefix-attention kernels: outputs, grids and the constants of each launch.

Letters as in `attention_forward`; S is the number of splits of the prefix's backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlprompt.kernels.operands import Heads, KeyValue, Packed, Scoring, Spans
from rlprompt.kernels.triton.attention_backward import (
    backward_own_kernel,
    backward_prefix_kernel,
    backward_query_kernel,
)
from rlprompt.kernels.triton.attention_decode import decode_own_kernel, decode_shared_kernel
from rlprompt.kernels.triton.attention_forward import forward_kernel
from rlprompt.kernels.triton.attention_rows import AttentionRows
from rlprompt.kernels.triton.attention_tiles import (
    Tile,
    backend_here,
    block_dim,
    tile_for,
)

SPLIT_PROGRAMS = 264
"""Programs that the prefix's backward aims at: twice the multiprocessors of an H100. A constant, so
that sums have the same order on every device."""

KERNELS = {
    "forward": forward_kernel,
    "backward_query": backward_query_kernel,
    "backward_own": backward_own_kernel,
    "backward_prefix": backward_prefix_kernel,
    "decode_shared": decode_shared_kernel,
    "decode_own": decode_own_kernel,
}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over tensors of `dtype` are held in: float32, or float64 in the interpreter."""
    return torch.promote_types(dtype, torch.float32)


def constants(
    kernel: str, backend: str, dtype: torch.dtype, heads: Heads, scoring: Scoring
) -> tuple[Tile, dict[str, Any]]:
    """The tile and the compile-time arguments of a launch.

    Args:
        kernel: a key of `KERNELS`.
        backend: "cuda", "hip" or "interpreter".
        dtype: dtype of queries, keys and values.
        heads: number and size of the layer's heads.
        scoring: how scores come about.
    """
    share = heads.queries // heads.keys
    tile = tile_for(kernel, backend, dtype, heads.dim, share)
    double = accumulator(dtype) == torch.float64
    return tile, {
        "KV_HEADS": heads.keys,
        "G": share,
        "SCALE": scoring.scaling,
        "SOFTCAP": scoring.softcap or 0.0,
        "WINDOW": scoring.window or 0,
        "ACC": tl.float64 if double else tl.float32,
        # Three TF32 products keep a float32 mantissa; a single one would lose 13 bits.
        "PRECISION": "tf32x3" if dtype == torch.float32 and backend == "cuda" else "ieee",
        "UPCAST": backend == "interpreter" and dtype == torch.bfloat16,
        "D": heads.dim,
        "BD": block_dim(heads.dim),
        "BM": tile.rows,
        "BN": tile.keys,
    }


class Launcher:
    """One kernel, ready for tensors of one shape of heads."""

    def __init__(self, kernel: str, query: Tensor, kv_heads: int, scoring: Scoring) -> None:
        """Choose tile and constants for queries [..., H, D]."""
        heads, dim = query.shape[-2:]
        self._kernel = KERNELS[kernel]
        self.tile, self._constants = constants(
            kernel, backend_here(), query.dtype, Heads(heads, kv_heads, dim), scoring
        )

    def __call__(self, programs: int, *arguments: Any) -> None:
        """Start `programs` programs, if any."""
        if programs == 0:
            return
        with torch.cuda.device_of(arguments[0]):
            self._kernel[(programs,)](
                *arguments,
                **self._constants,
                num_warps=self.tile.warps,
                num_stages=self.tile.stages,
                enable_fp_fusion=True,
            )


def strides(*tensors: Tensor) -> list[int]:
    """Token and head strides of [N, H, D] tensors."""
    return [step for t in tensors for step in (t.stride(0), t.stride(1))]


def prefix_strides(*tensors: Tensor) -> list[int]:
    """Token and head strides of [H, P, D] tensors."""
    return [step for t in tensors for step in (t.stride(1), t.stride(0))]


def forward(
    packed: Packed, prefix: KeyValue, rows: AttentionRows, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Outputs [N, H, D] and natural-log LSE [N, H]; arguments as of `prefix_attention`."""
    query = packed.query
    tokens, heads, dim = query.shape
    kv_heads = packed.key.shape[1]
    out = query.new_empty(tokens, heads, dim)
    lse = query.new_empty(tokens, heads, dtype=accumulator(query.dtype))
    launch = Launcher("forward", query, kv_heads, scoring)
    tiles = triton.cdiv(rows.max_length * (heads // kv_heads), launch.tile.rows)
    num_rows, num_prefix = rows.table.shape[0], prefix.key.shape[1]
    launch(
        tiles * num_rows * kv_heads,
        *packed, *prefix, rows.table, out, lse, num_rows, num_prefix, tiles,
        *strides(*packed), *prefix_strides(*prefix),
    )  # fmt: skip
    return out, lse


class Saved(NamedTuple):
    """What the backward needs of the forward."""

    packed: Packed
    prefix: KeyValue
    rows: AttentionRows
    scoring: Scoring
    out: Tensor
    """[N, H, D], contiguous."""
    lse: Tensor
    """[N, H], contiguous."""


def backward_query(saved: Saved, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the queries [N, H, D], and delta [N, H] (see `attention_backward`)."""
    query, key, _ = saved.packed
    kv_heads = key.shape[1]
    grad, delta = torch.empty_like(saved.out), torch.empty_like(saved.lse)
    launch = Launcher("backward_query", query, kv_heads, saved.scoring)
    tiles = triton.cdiv(saved.rows.max_length * (query.shape[1] // kv_heads), launch.tile.rows)
    num_rows, num_prefix = saved.rows.table.shape[0], saved.prefix.key.shape[1]
    launch(
        tiles * num_rows * kv_heads,
        *saved.packed, *saved.prefix, saved.rows.table, saved.out, grad_out, saved.lse, delta, grad,
        num_rows, num_prefix, tiles,
        *strides(*saved.packed), *prefix_strides(*saved.prefix), *strides(grad_out),
    )  # fmt: skip
    return grad, delta


def backward_own(saved: Saved, grad_out: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the packed keys and values, [N, H_kv, D] each."""
    query, key, value = saved.packed
    kv_heads = key.shape[1]
    grads = (key.new_empty(key.shape), value.new_empty(value.shape))
    launch = Launcher("backward_own", query, kv_heads, saved.scoring)
    tiles = triton.cdiv(saved.rows.max_length, launch.tile.keys)
    num_rows = saved.rows.table.shape[0]
    launch(
        tiles * num_rows * kv_heads,
        *saved.packed, grad_out, saved.lse, delta, saved.rows.table, saved.rows.positions, *grads,
        num_rows, *strides(*saved.packed, grad_out),
    )  # fmt: skip
    return grads


def backward_prefix(saved: Saved, grad_out: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the prefix [H_kv, P, D], summed over all tokens in the accumulator's dtype."""
    query = saved.packed.query
    kv_heads, num_prefix, dim = saved.prefix.key.shape
    tokens, heads = query.shape[:2]
    launch = Launcher("backward_prefix", query, kv_heads, saved.scoring)
    key_tiles = triton.cdiv(num_prefix, launch.tile.keys)
    most = max(1, triton.cdiv(tokens * (heads // kv_heads), 4 * launch.tile.rows))
    splits = min(most, triton.cdiv(SPLIT_PROGRAMS, max(1, key_tiles * kv_heads)))
    per_split = triton.cdiv(tokens, splits)
    partials = query.new_empty(2, splits, kv_heads, num_prefix, dim, dtype=saved.lse.dtype)
    launch(
        splits * key_tiles * kv_heads,
        query, *saved.prefix, grad_out, saved.lse, delta, saved.rows.positions, *partials.unbind(),
        tokens, num_prefix, per_split, key_tiles,
        *strides(query), *prefix_strides(*saved.prefix), *strides(grad_out),
    )  # fmt: skip
    # Copied, because the result of a custom operator must not share memory with another one.
    grad_key, grad_value = partials.sum(1).unbind()
    return grad_key.clone(), grad_value.clone()


def decode(
    query: Tensor, own: KeyValue, prefix: KeyValue, spans: Spans, scoring: Scoring
) -> Tensor:
    """Outputs [B, H, D]; arguments as of `prefix_decode`."""
    rows, heads, dim = query.shape
    kv_heads, num_prefix = prefix.key.shape[:2]
    acc = accumulator(query.dtype)
    held = rows if num_prefix else 0
    state = query.new_empty(held, heads, dim, dtype=acc)
    tops, totals = query.new_empty(2, held, heads, dtype=acc).unbind()
    out = query.new_empty(rows, heads, dim)
    if num_prefix:
        launch = Launcher("decode_shared", query, kv_heads, scoring)
        tiles = triton.cdiv(rows * (heads // kv_heads), launch.tile.rows)
        launch(
            tiles * kv_heads,
            query, *prefix, spans.lengths, state, tops, totals, rows, num_prefix,
            *strides(query), *prefix_strides(*prefix),
        )  # fmt: skip
    Launcher("decode_own", query, kv_heads, scoring)(
        rows * kv_heads,
        query, *own, *spans, state, tops, totals, out, num_prefix, *strides(query),
        *(step for t in own for step in t.stride()[:3]),
    )  # fmt: skip
    return out
