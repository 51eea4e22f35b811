"""The backward kernels: queries, own keys with parents, and the prefix that all rows share.

With the LSE of the whole softmax, P = exp(S - LSE) and dS = P * (dO V^T - delta), where
delta = rowsum(dO * O), hold for each part of the keys by itself (FlashAttention-2, Dao 2023,
algorithm 2). Each gradient is summed by one program, in one order: no atomics anywhere.

The prefix is seen by every token of the batch, yet has few keys, so one program per key tile would
leave most of a GPU idle. Its kernel splits the batch's tokens; splits write float32 partial sums,
and the wrapper adds them in a fixed order.

Letters as in `attention_forward`; there, too, the reason for long parameter lists.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlprompt.kernels.triton.attention_forward import (
    LOG2E,
    dot,
    key_ranges,
    key_tile,
    load_rows,
    store_rows,
    visible,
)


@triton.jit
def probabilities(product, lse, seen, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Softmax weights from q k^T and an LSE in log2, and d(score) / d(q k^T) relative to SCALE."""
    if SOFTCAP > 0.0:
        unit = 1.0 - 2.0 / (1.0 + tl.exp2(product * (2.0 * LOG2E * SCALE / SOFTCAP)))  # tanh
        weights = tl.exp2(unit * (SOFTCAP * LOG2E) - lse)
        slope = 1.0 - unit * unit
    else:
        weights = tl.exp2(product * (SCALE * LOG2E) - lse)
        slope = 1.0
    return tl.where(seen, weights, 0.0), slope


@triton.jit
def query_tile(
    grad, query, grad_out, lse, delta, K, V, key_stride, value_stride, n, stop, limit, earliest,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add what the keys n [BN] give to dQ [BM, BD]; arguments as of `attend_tile`."""
    d = tl.arange(0, BD)
    place = tl.arange(0, BN)
    keys = load_rows(K, place * key_stride, d, n < stop, D, BD)
    values = load_rows(V, place * value_stride, d, n < stop, D, BD)
    seen = n[None, :] <= limit[:, None]
    if WINDOW > 0:
        seen = seen & (n[None, :] >= earliest[:, None])
    product = dot(query, tl.trans(keys), PRECISION, UPCAST)
    weights, slope = probabilities(product, lse[:, None], seen, SCALE, SOFTCAP)
    grad_weights = dot(grad_out, tl.trans(values), PRECISION, UPCAST)
    grad_scores = weights * (grad_weights - delta[:, None]) * slope
    return grad + dot(grad_scores.to(keys.dtype), keys, PRECISION, UPCAST)


@triton.jit
def backward_query_kernel(
    Q, K, V, PK, PV, TABLE, OUT, DOUT, LSE, DELTA, DQ,
    num_rows, num_prefix, max_tiles,
    q_stride, q_head, k_stride, k_head, v_stride, v_head,
    pk_stride, pk_head, pv_stride, pv_head, do_stride, do_head,
    KV_HEADS: tl.constexpr, G: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of queries [N, H, D], and delta [N, H], which other kernels read."""
    program = tl.program_id(0)
    head = program % KV_HEADS
    row = (program // KV_HEADS) % num_rows
    tile = max_tiles - 1 - program // (KV_HEADS * num_rows)
    first = tl.load(TABLE + row * 6)
    pairs = (tl.load(TABLE + row * 6 + 1) - first) * G
    if tile * BM >= pairs:
        return
    d = tl.arange(0, BD)
    r = tile * BM + tl.arange(0, BM)
    inside = r < pairs
    token0 = first + tile * BM // G
    token = first + r // G
    within, group = token - token0, r % G
    far = tl.cast(token0, tl.int64)
    heads = KV_HEADS * G
    packed = (within * heads + group) * D  # where contiguous [N, H, D] holds the tile's rows
    corner = (far * heads + head * G) * D
    query = load_rows(
        Q + far * q_stride + head * G * q_head, within * q_stride + group * q_head, d, inside, D, BD
    )
    grad_out = load_rows(
        DOUT + far * do_stride + head * G * do_head, within * do_stride + group * do_head,
        d, inside, D, BD,
    )  # fmt: skip
    out = load_rows(OUT + corner, packed, d, inside, D, BD)
    scalars = far * heads + head * G + within * heads + group
    lse = tl.load(LSE + scalars, mask=inside, other=float("inf")) * LOG2E
    delta = tl.sum(out.to(ACC) * grad_out.to(ACC), 1)
    tl.store(DELTA + scalars, delta, mask=inside)
    grad = tl.zeros([BM, BD], dtype=ACC)
    p_start, m_start, o_start, parent_end, own_end, one, two, three = key_ranges(
        TABLE, row, tile, num_prefix, G, WINDOW, BM, BN
    )
    for i in range(0, three):
        in_prefix, in_own, n0, stop = key_tile(
            i, p_start, m_start, o_start, num_prefix, parent_end, own_end, one, two, BN
        )
        limit, earliest = visible(TABLE, row, token, in_prefix, in_own, stop, num_prefix, WINDOW)
        key_stride = tl.where(in_prefix, pk_stride, k_stride)
        value_stride = tl.where(in_prefix, pv_stride, v_stride)
        keys_at = tl.where(in_prefix, PK + head * pk_head, K + head * k_head)
        values_at = tl.where(in_prefix, PV + head * pv_head, V + head * v_head)
        here = tl.cast(n0, tl.int64)
        grad = query_tile(
            grad, query, grad_out, lse, delta,
            keys_at + here * key_stride, values_at + here * value_stride,
            key_stride, value_stride, n0 + tl.arange(0, BN), stop, limit, earliest,
            SCALE, SOFTCAP, WINDOW, PRECISION, UPCAST, D, BD, BN,
        )  # fmt: skip
    store_rows(DQ + corner, packed, d, grad * SCALE, inside, D, BD)


@triton.jit
def key_grads(
    grad_key, grad_value, keys, values, n, key_pos, Q, DOUT, LSE, DELTA, POSITIONS,
    q_stride, q_head, do_stride, do_head, head, origin, r, r0, stop, causal,
    KV_HEADS: tl.constexpr, G: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add to dK and dV [BN, BD] what the (token, head) pairs r [BM] give, from `origin` on.

    Pairs end before `stop`; `r0` is the first. Under `causal`, a token sees keys n up to its own
    place. Keys beyond their range need no mask: what they collect is not stored.
    """
    d = tl.arange(0, BD)
    heads = KV_HEADS * G
    inside = r < stop
    token0 = origin + r0 // G
    within, group = r // G - r0 // G, r % G
    far = tl.cast(token0, tl.int64)
    query = load_rows(
        Q + far * q_stride + head * G * q_head, within * q_stride + group * q_head,
        d, inside, D, BD,
    )  # fmt: skip
    grad_out = load_rows(
        DOUT + far * do_stride + head * G * do_head, within * do_stride + group * do_head,
        d, inside, D, BD,
    )  # fmt: skip
    scalars = far * heads + head * G + within * heads + group
    lse = tl.load(LSE + scalars, mask=inside, other=float("inf")) * LOG2E
    delta = tl.load(DELTA + scalars, mask=inside, other=0.0)
    limit = tl.where(causal, token0 + within, 2147483647)
    seen = (n[:, None] <= limit[None, :]) & inside[None, :]
    if WINDOW > 0:
        query_pos = tl.load(POSITIONS + token0 + within, mask=inside, other=0)
        seen = seen & (query_pos[None, :] - key_pos[:, None] < WINDOW)
    product = dot(keys, tl.trans(query), PRECISION, UPCAST)
    weights, slope = probabilities(product, lse[None, :], seen, SCALE, SOFTCAP)
    grad_value += dot(weights.to(grad_out.dtype), grad_out, PRECISION, UPCAST)
    grad_weights = dot(values, tl.trans(grad_out), PRECISION, UPCAST)
    grad_scores = weights * (grad_weights - delta[None, :]) * slope
    grad_key += dot(grad_scores.to(query.dtype), query, PRECISION, UPCAST)
    return grad_key, grad_value


@triton.jit
def backward_own_kernel(
    Q, K, V, DOUT, LSE, DELTA, TABLE, POSITIONS, DK, DV,
    num_rows,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, do_stride, do_head,
    KV_HEADS: tl.constexpr, G: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients [N, H_kv, D] of one tile of a row's keys: from the row, then from its children.

    Early tiles are seen by most queries, and come first.
    """
    program = tl.program_id(0)
    head = program % KV_HEADS
    row = (program // KV_HEADS) % num_rows
    tile = program // (KV_HEADS * num_rows)
    first = tl.load(TABLE + row * 6)
    end = tl.load(TABLE + row * 6 + 1)
    n0 = first + tile * BN
    if n0 >= end:
        return
    child_first = tl.load(TABLE + row * 6 + 4)
    child_end = tl.load(TABLE + row * 6 + 5)
    d = tl.arange(0, BD)
    place = tl.arange(0, BN)
    n = n0 + place
    far = tl.cast(n0, tl.int64)
    keys = load_rows(K + far * k_stride + head * k_head, place * k_stride, d, n < end, D, BD)
    values = load_rows(V + far * v_stride + head * v_head, place * v_stride, d, n < end, D, BD)
    key_pos = n
    last = end
    if WINDOW > 0:
        key_pos = tl.load(POSITIONS + n, mask=n < end, other=0)
        last = tl.minimum(end, n0 + BN + WINDOW - 1)
    grad_key = tl.zeros([BN, BD], dtype=ACC)
    grad_value = tl.zeros([BN, BD], dtype=ACC)
    own_start, own_stop, child_stop = (
        (n0 - first) * G,
        (last - first) * G,
        (child_end - child_first) * G,
    )
    own_tiles = tl.cdiv(own_stop - own_start, BM)
    for i in range(0, own_tiles + tl.cdiv(child_stop, BM)):
        causal = i < own_tiles
        r0 = tl.where(causal, own_start + i * BM, (i - own_tiles) * BM)
        grad_key, grad_value = key_grads(
            grad_key, grad_value, keys, values, n, key_pos, Q, DOUT, LSE, DELTA, POSITIONS,
            q_stride, q_head, do_stride, do_head, head, tl.where(causal, first, child_first),
            r0 + tl.arange(0, BM), r0, tl.where(causal, own_stop, child_stop), causal,
            KV_HEADS, G, SCALE, SOFTCAP, WINDOW, PRECISION, UPCAST, D, BD,
        )  # fmt: skip
    corner = (far * KV_HEADS + head) * D
    store_rows(DK + corner, place * KV_HEADS * D, d, grad_key * SCALE, n < end, D, BD)
    store_rows(DV + corner, place * KV_HEADS * D, d, grad_value, n < end, D, BD)


@triton.jit
def backward_prefix_kernel(
    Q, PK, PV, DOUT, LSE, DELTA, POSITIONS, DK, DV,
    num_tokens, num_prefix, tokens_per_split, key_tiles,
    q_stride, q_head, pk_stride, pk_head, pv_stride, pv_head, do_stride, do_head,
    KV_HEADS: tl.constexpr, G: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Partial dK and dV [S, H_kv, P, D] of one tile of prefix keys from one split of all tokens."""
    program = tl.program_id(0)
    head = program % KV_HEADS
    tile = (program // KV_HEADS) % key_tiles
    split = program // (KV_HEADS * key_tiles)
    first = split * tokens_per_split
    last = tl.minimum(num_tokens, first + tokens_per_split)
    d = tl.arange(0, BD)
    n = tile * BN + tl.arange(0, BN)
    keys = load_rows(PK + head * pk_head, n * pk_stride, d, n < num_prefix, D, BD)
    values = load_rows(PV + head * pv_head, n * pv_stride, d, n < num_prefix, D, BD)
    grad_key = tl.zeros([BN, BD], dtype=ACC)
    grad_value = tl.zeros([BN, BD], dtype=ACC)
    for r0 in range(0, (last - first) * G, BM):
        grad_key, grad_value = key_grads(
            grad_key, grad_value, keys, values, n, n, Q, DOUT, LSE, DELTA, POSITIONS,
            q_stride, q_head, do_stride, do_head, head, first,
            r0 + tl.arange(0, BM), r0, (last - first) * G, False,
            KV_HEADS, G, SCALE, SOFTCAP, WINDOW, PRECISION, UPCAST, D, BD,
        )  # fmt: skip
    corner = tl.cast(split * KV_HEADS + head, tl.int64) * num_prefix * D
    store_rows(DK + corner, n * D, d, grad_key * SCALE, n < num_prefix, D, BD)
    store_rows(DV + corner, n * D, d, grad_value, n < num_prefix, D, BD)
