"""Attention over [shared prefix | parent | own causal keys] as PyTorch operators, in Triton.

Tokens of many rows stand packed behind each other. All of them see one prefix; the tokens of a
completion also see their group's query, its parent; within a row attention is causal. Nothing is
padded or copied: a row is a range of packed tokens, and the gradients of prefix and queries arrive
summed over everything that saw them, in float32 and in a fixed order.

The operators are opaque to torch.compile (`custom_op`), know their output shapes without running
(`register_fake`), and have a backward that is itself an operator.

Letters: N packed tokens, R rows, B decoding rows, S own columns, P prefix tokens, H heads,
H_kv key/value heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlprompt.kernels.operands import KeyValue, Packed, Scoring, Spans
from rlprompt.kernels.triton import attention_launch as launch
from rlprompt.kernels.triton.attention_launch import Saved
from rlprompt.kernels.triton.attention_rows import MAX_HEAD_DIM, AttentionRows

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def prefix_attention(
    packed: Packed, prefix: KeyValue, rows: AttentionRows, scoring: Scoring
) -> Tensor:
    """Softmax attention of packed tokens; differentiable in all five tensors, once.

    Args:
        packed: tensors of one dtype; every token belongs to one row. Any strides as long as the
            last dimension is contiguous, else it is copied.
        prefix: keys and values [H_kv, P, D]; P may be 0. May have another dtype than `packed`: it
            is rounded to that one, and its gradient comes in its own.
        rows: the ranges that say who sees whom; on the same device.
        scoring: how scores come about.

    Returns:
        [N, H, D], contiguous.

    Raises:
        ValueError: shapes that do not fit, or D beyond 256.
    """
    check_shapes(packed.query, KeyValue(packed.key, packed.value), prefix)
    out: Tensor = _forward_op(
        *packed, *prefix, rows.table, rows.positions, rows.max_length,
        scoring.scaling, scoring.softcap or 0.0, scoring.window or 0,
    )[0]  # fmt: skip
    return out


def prefix_decode(
    query: Tensor, own: KeyValue, prefix: KeyValue, spans: Spans, scoring: Scoring
) -> Tensor:
    """Attention of one new token per row; no gradient.

    Args:
        query: [B, H, D].
        own: keys and values [B, H_kv, S, D], the new token's among them.
        prefix: keys and values [H_kv, P, D] in the dtype of `query`; P may be 0.
        spans: columns that each row sees; a row without any sees the prefix alone.
        scoring: how scores come about.

    Returns:
        [B, H, D]; zero for a row that sees nothing.

    Raises:
        ValueError: shapes that do not fit, or D beyond 256.
    """
    check_shapes(query, own, prefix)
    scaling, softcap, window = scoring
    out: Tensor = _decode_op(query, *own, *prefix, *spans, scaling, softcap or 0.0, window or 0)
    return out


def check_shapes(query: Tensor, own: KeyValue, prefix: KeyValue) -> None:
    """Raise ValueError unless heads and head dims fit each other; kernels would read elsewhere."""
    heads, dim = query.shape[-2:]
    kv_heads = own.key.shape[1]
    if own.key.shape != own.value.shape or prefix.key.shape != prefix.value.shape:
        raise ValueError("keys and values differ in shape")
    if prefix.key.shape[0] != kv_heads or heads % kv_heads:
        raise ValueError(f"{heads} query, {kv_heads} own, {prefix.key.shape[0]} prefix heads")
    if {own.key.shape[-1], prefix.key.shape[-1]} != {dim} or dim > MAX_HEAD_DIM:
        raise ValueError(f"head dims must be equal and at most {MAX_HEAD_DIM}, not {dim}")


def _straight(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies where the last dimension is strided: kernels step through it one by one."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


@torch.library.custom_op("rlprompt::prefix_attention", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    table: Tensor,
    positions: Tensor,
    max_length: int,
    scaling: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """`prefix_attention` and the LSE; an operator's signature is flat."""
    query, key, value = _straight(query, key, value)
    prefix = _straight(prefix_key.to(query.dtype), prefix_value.to(query.dtype))
    return launch.forward(
        Packed(query, key, value),
        KeyValue(*prefix),
        AttentionRows(table.contiguous(), positions.contiguous(), max_length),
        Scoring(scaling, softcap or None, window or None),
    )


@_forward_op.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:2], dtype=launch.accumulator(query.dtype))
    return query.new_empty(query.shape), lse


@torch.library.custom_op("rlprompt::prefix_attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    table: Tensor,
    positions: Tensor,
    out: Tensor,
    lse: Tensor,
    max_length: int,
    scaling: float,
    softcap: float,
    window: int,
    wants_own: bool,
    wants_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All five gradients; those that are not wanted are empty tensors."""
    grad_out, query, key, value = _straight(grad_out, query, key, value)
    prefix = _straight(prefix_key.to(query.dtype), prefix_value.to(query.dtype))
    saved = Saved(
        Packed(query, key, value),
        KeyValue(*prefix),
        AttentionRows(table.contiguous(), positions.contiguous(), max_length),
        Scoring(scaling, softcap or None, window or None),
        out,
        lse,
    )
    grad_query, delta = launch.backward_query(saved, grad_out)
    own = (key.new_empty(0), value.new_empty(0))
    shared = (prefix_key.new_empty(0), prefix_value.new_empty(0))
    if wants_own:
        own = launch.backward_own(saved, grad_out, delta)
    if wants_prefix:
        grads = launch.backward_prefix(saved, grad_out, delta)
        shared = (grads[0].to(prefix_key.dtype), grads[1].to(prefix_value.dtype))
    return grad_query, *own, *shared


@_backward_op.register_fake
def _(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *others: Any,
) -> Gradients:
    def like(tensor: Tensor, wanted: bool) -> Tensor:
        return tensor.new_empty(tensor.shape if wanted else 0)

    own, shared = others[-2:]
    return (
        query.new_empty(query.shape),
        like(key, own),
        like(value, own),
        like(prefix_key, shared),
        like(prefix_value, shared),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.scalars = inputs[7:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    wants = ctx.needs_input_grad
    own, shared = wants[1] or wants[2], wants[3] or wants[4]
    *tensors, out, lse = ctx.saved_tensors
    grads = _backward_op(grad_out, *tensors, out, lse, *ctx.scalars, own, shared)
    picked = [g if wanted else None for g, wanted in zip(grads, wants[:5], strict=True)]
    return (*picked, *[None] * 6)


_forward_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("rlprompt::prefix_decode", mutates_args=())
def _decode_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    firsts: Tensor,
    lengths: Tensor,
    scaling: float,
    softcap: float,
    window: int,
) -> Tensor:
    """`prefix_decode`; an operator's signature is flat."""
    query, key, value, *prefix = _straight(query, key, value, prefix_key, prefix_value)
    spans = Spans(firsts.contiguous(), lengths.contiguous())
    scoring = Scoring(scaling, softcap or None, window or None)
    return launch.decode(query, KeyValue(key, value), KeyValue(*prefix), spans, scoring)


@_decode_op.register_fake
def _(query: Tensor, *others: Any) -> Tensor:
    return query.new_empty(query.shape)
