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
def attend_tile(
    acc, top, total, query, K, V, key_stride, value_stride, n, stop, limit, earliest,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Carry the online softmax (acc, top, total) over the keys n [BN] that stand from K, V on.

    Keys end before `stop`. A query sees keys up to `limit` [BM] and, under a window, from
    `earliest` [BM] on.
    """
    d = tl.arange(0, BD)
    place = tl.arange(0, BN)
    keys = load_rows(K, place * key_stride, d, n < stop, D, BD)
    scores = dot(query, tl.trans(keys), PRECISION, UPCAST)
    if SOFTCAP > 0.0:  # noqa: SIM108 - a kernel compiles one side of an `if`
        scores = capped(scores * SCALE, SOFTCAP) * LOG2E
    else:
        scores = scores * (SCALE * LOG2E)
    seen = n[None, :] <= limit[:, None]
    if WINDOW > 0:
        seen = seen & (n[None, :] >= earliest[:, None])
    scores = tl.where(seen, scores, float("-inf"))
    values = load_rows(V, place * value_stride, d, n < stop, D, BD)
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet has -inf, and -inf - -inf would be NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None] + dot(weights.to(values.dtype), values, PRECISION, UPCAST)
    return acc, new_top, total


@triton.jit
def key_ranges(
    TABLE, row, tile, num_prefix,
    G: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What a tile of (token, head) pairs sees: ranges of prefix, parent and own keys.

    Returns the place where each range starts, cut by the window of the tile's earliest query; the
    place where the last two end; and the number of key tiles of the first, of two, of all.
    """
    first = tl.load(TABLE + row * 6)
    end = tl.load(TABLE + row * 6 + 1)
    parent_first = tl.load(TABLE + row * 6 + 2)
    parent_end = tl.load(TABLE + row * 6 + 3)
    own_end = tl.minimum(end, first + (tile * BM + BM - 1) // G + 1)
    p_start, m_start, o_start = 0, parent_first, first
    if WINDOW > 0:
        parents = parent_end - parent_first
        earliest = num_prefix + parents + tile * BM // G - WINDOW + 1
        p_start = tl.minimum(tl.maximum(earliest, 0), num_prefix)
        m_start = parent_first + tl.minimum(tl.maximum(earliest - num_prefix, 0), parents)
        o_start = first + tl.maximum(earliest - num_prefix - parents, 0)
    one = tl.cdiv(num_prefix - p_start, BN)
    two = one + tl.cdiv(parent_end - m_start, BN)
    three = two + tl.cdiv(own_end - o_start, BN)
    return p_start, m_start, o_start, parent_end, own_end, one, two, three


@triton.jit
def key_tile(
    i, p_start, m_start, o_start, num_prefix, parent_end, own_end, one, two, BN: tl.constexpr
):
    """Of key tile i: whether it is of the prefix, whether own, its first key, its range's end."""
    in_prefix, in_own = i < one, i >= two
    skipped = tl.where(in_own, two, tl.where(in_prefix, 0, one))
    start = tl.where(in_own, o_start, tl.where(in_prefix, p_start, m_start))
    stop = tl.where(in_own, own_end, tl.where(in_prefix, num_prefix, parent_end))
    return in_prefix, in_own, start + (i - skipped) * BN, stop


@triton.jit
def visible(TABLE, row, token, in_prefix, in_own, stop, num_prefix, WINDOW: tl.constexpr):
    """The last key, and under a window the first, that each query [BM] sees of a range."""
    limit = tl.where(in_own, token, stop - 1)
    earliest = limit
    if WINDOW > 0:
        first = tl.load(TABLE + row * 6)
        parent_first = tl.load(TABLE + row * 6 + 2)
        before_own = num_prefix + tl.load(TABLE + row * 6 + 3) - parent_first
        # Position q is place q in the prefix, q - P + parent_first in the parent, and so on.
        back = tl.where(
            in_own, first - before_own, tl.where(in_prefix, 0, parent_first - num_prefix)
        )
        earliest = before_own + token - first - WINDOW + 1 + back
    return limit, earliest


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

    Late tiles of causal rows have most keys, so they come first. One loop runs through the key
    tiles of all three ranges: three loops would be three times the code, and the pipeline of loads
    would run empty between them.
    """
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
    query = load_rows(
        Q + far * q_stride + head * G * q_head, within * q_stride + group * q_head, d, inside, D, BD
    )
    acc = tl.zeros([BM, BD], dtype=ACC)
    top = tl.full([BM], float("-inf"), dtype=ACC)
    total = tl.zeros([BM], dtype=ACC)
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
        acc, top, total = attend_tile(
            acc, top, total, query, keys_at + here * key_stride, values_at + here * value_stride,
            key_stride, value_stride, n0 + tl.arange(0, BN), stop, limit, earliest,
            SCALE, SOFTCAP, WINDOW, PRECISION, UPCAST, D, BD, BN,
        )  # fmt: skip
    heads = KV_HEADS * G
    out = OUT + (far * heads + head * G) * D
    store_rows(out, (within * heads + group) * D, d, acc / total[:, None], inside, D, BD)
    lse = LSE + far * heads + head * G + within * heads + group
    tl.store(lse, top * LN2 + tl.log(total), mask=inside)
