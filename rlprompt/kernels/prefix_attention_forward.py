"""The forward kernel: one pass over [prefix | parent | own causal] keys with one online softmax.

A tile holds (token, head) pairs of one row and one key/value head: all G query heads that share
the keys stand in one tile, so keys are read once for them and short rows fill a tile. The softmax
is the online one of Milakov and Gimelshein (2018) in the form of FlashAttention-2 (Dao, 2023).

Letters: N packed tokens, R rows, P prefix tokens, H heads, H_kv key/value heads, G = H / H_kv,
D head dim, BM rows per tile, BN keys per tile, BD head dim padded to a power of two.

Kernels take more than eight parameters because a GPU kernel has no objects to group them in.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Matrix product; the interpreter multiplies the bits of bfloat16, so UPCAST is for it."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def capped(scores, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(scores / SOFTCAP) by exp2, which every backend has."""
    grown = tl.exp2(scores * (2.0 * LOG2E / SOFTCAP))
    return SOFTCAP - 2.0 * SOFTCAP / (1.0 + grown)


@triton.jit
def load_rows(base, rows_at, d, seen, D: tl.constexpr, BD: tl.constexpr):
    """A [rows, BD] block; rows that are not `seen` and padding of the head dim are zero."""
    places = base + rows_at[:, None] + d[None, :]
    if D == BD:
        return tl.load(places, mask=seen[:, None], other=0.0)
    return tl.load(places, mask=seen[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def store_rows(base, rows_at, d, block, seen, D: tl.constexpr, BD: tl.constexpr):
    """Write the [rows, D] part of a block, rounded to the dtype of its place."""
    places = base + rows_at[:, None] + d[None, :]
    rounded = block.to(base.dtype.element_ty)
    if D == BD:
        tl.store(places, rounded, mask=seen[:, None])
    else:
        tl.store(places, rounded, mask=seen[:, None] & (d[None, :] < D))


@triton.jit
def span_scores(
    query, keys, n, end, token, query_pos, shift,
    CAUSAL: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores [BM, BN] in units of log2, -inf where not seen.

    `n` [BN] are key places, `token` [BM] the queries' places (compared when CAUSAL), and the
    position of key n is n + shift.
    """
    scores = dot(query, tl.trans(keys), PRECISION, UPCAST)
    if SOFTCAP > 0.0:
        scores = capped(scores * SCALE, SOFTCAP) * LOG2E
    else:
        scores = scores * (SCALE * LOG2E)
    seen = n[None, :] < end
    if CAUSAL:
        seen = seen & (n[None, :] <= token[:, None])
    if WINDOW > 0:
        seen = seen & (query_pos[:, None] - n[None, :] - shift < WINDOW)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def attend_span(
    acc, top, total, query, K, V, key_stride, value_stride, first, end, token, query_pos, shift,
    CAUSAL: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Carry the online softmax (acc, top, total) over keys [first, end)."""
    d = tl.arange(0, BD)
    place = tl.arange(0, BN)
    start = first
    if WINDOW > 0:
        start = tl.maximum(first, tl.min(query_pos) - WINDOW + 1 - shift)
    for n0 in range(start, end, BN):
        n = n0 + place
        here = tl.cast(n0, tl.int64)
        keys = load_rows(K + here * key_stride, place * key_stride, d, n < end, D, BD)
        scores = span_scores(
            query, keys, n, end, token, query_pos, shift,
            CAUSAL, SCALE, SOFTCAP, WINDOW, PRECISION, UPCAST,
        )  # fmt: skip
        values = load_rows(V + here * value_stride, place * value_stride, d, n < end, D, BD)
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no key yet has -inf, and -inf - -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + dot(weights.to(values.dtype), values, PRECISION, UPCAST)
        top = new_top
    return acc, top, total


@triton.jit
def forward_kernel(
    Q, K, V, PK, PV, TABLE, OUT, LSE,
    num_rows, num_prefix, max_tiles,
    q_stride, q_head, k_stride, k_head, v_stride, v_head,
    pk_stride, pk_head, pv_stride, pv_head,
    KV_HEADS: tl.constexpr, G: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Outputs [N, H, D] and natural-log LSE [N, H] of one tile; the grid is one-dimensional.

    Late tiles of causal rows have most keys, so they come first.
    """
    program = tl.program_id(0)
    head = program % KV_HEADS
    row = (program // KV_HEADS) % num_rows
    tile = max_tiles - 1 - program // (KV_HEADS * num_rows)
    first = tl.load(TABLE + row * 6)
    end = tl.load(TABLE + row * 6 + 1)
    if tile * BM >= (end - first) * G:
        return
    parent_first = tl.load(TABLE + row * 6 + 2)
    parent_end = tl.load(TABLE + row * 6 + 3)
    d = tl.arange(0, BD)
    r = tile * BM + tl.arange(0, BM)
    inside = r < (end - first) * G
    token0 = first + tile * BM // G
    token = first + r // G
    within, group = token - token0, r % G
    far = tl.cast(token0, tl.int64)
    query = load_rows(
        Q + far * q_stride + head * G * q_head, within * q_stride + group * q_head, d, inside, D, BD
    )
    own_shift = num_prefix + parent_end - parent_first - first
    query_pos = token + own_shift
    acc = tl.zeros([BM, BD], dtype=ACC)
    top = tl.full([BM], float("-inf"), dtype=ACC)
    total = tl.zeros([BM], dtype=ACC)
    acc, top, total = attend_span(
        acc, top, total, query, PK + head * pk_head, PV + head * pv_head, pk_stride, pv_stride,
        0, num_prefix, token, query_pos, 0,
        False, SCALE, SOFTCAP, WINDOW, PRECISION, UPCAST, D, BD, BN,
    )  # fmt: skip
    acc, top, total = attend_span(
        acc, top, total, query, K + head * k_head, V + head * v_head, k_stride, v_stride,
        parent_first, parent_end, token, query_pos, num_prefix - parent_first,
        False, SCALE, SOFTCAP, WINDOW, PRECISION, UPCAST, D, BD, BN,
    )  # fmt: skip
    last = tl.minimum(end, first + (tile * BM + BM - 1) // G + 1)
    acc, top, total = attend_span(
        acc, top, total, query, K + head * k_head, V + head * v_head, k_stride, v_stride,
        first, last, token, query_pos, own_shift,
        True, SCALE, SOFTCAP, WINDOW, PRECISION, UPCAST, D, BD, BN,
    )  # fmt: skip
    heads = KV_HEADS * G
    out = OUT + (far * heads + head * G) * D
    store_rows(out, (within * heads + group) * D, d, acc / total[:, None], inside, D, BD)
    lse = LSE + far * heads + head * G + within * heads + group
    tl.store(lse, top * LN2 + tl.log(total), mask=inside)
