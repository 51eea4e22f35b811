"""Decode kernels: one new token per row over [keys that rows share | the row's own keys].

The first launch is a matrix product per key/value head: the queries of all rows against the prefix,
which is read once for the batch. It leaves the online softmax unfinished, (acc, top, total) in
float32. The second starts from there and goes on over each row's own keys, so there is no merge.

Letters: B rows, S own columns, P prefix tokens, H heads, H_kv key/value heads, G = H / H_kv, D head
dim, BM rows per tile, BN keys per tile, BD head dim padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlprompt.kernels.triton.attention_forward import attend_tile, load_rows, store_rows


@triton.jit
def decode_shared_kernel(
    Q, PK, PV, LENGTHS, STATE, TOPS, TOTALS,
    num_rows, num_prefix,
    q_row, q_head, pk_stride, pk_head, pv_stride, pv_head,
    KV_HEADS: tl.constexpr, G: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Softmax state over the prefix: STATE [B, H, D], TOPS (log2) and TOTALS [B, H]."""
    program = tl.program_id(0)
    head = program % KV_HEADS
    r0 = program // KV_HEADS * BM
    d = tl.arange(0, BD)
    r = r0 + tl.arange(0, BM)
    inside = r < num_rows * G
    row0 = r0 // G
    row, group = r // G, r % G
    within = row - row0
    far = tl.cast(row0, tl.int64)
    query = load_rows(
        Q + far * q_row + head * G * q_head, within * q_row + group * q_head, d, inside, D, BD
    )
    earliest = row
    if WINDOW > 0:
        own = tl.load(LENGTHS + row, mask=inside, other=1)
        earliest = num_prefix + own - WINDOW
    acc = tl.zeros([BM, BD], dtype=ACC)
    top = tl.full([BM], float("-inf"), dtype=ACC)
    total = tl.zeros([BM], dtype=ACC)
    limit = tl.zeros([BM], dtype=tl.int32) + num_prefix - 1
    for n0 in range(0, num_prefix, BN):
        acc, top, total = attend_tile(
            acc, top, total, query,
            PK + head * pk_head + n0 * pk_stride, PV + head * pv_head + n0 * pv_stride,
            pk_stride, pv_stride, n0 + tl.arange(0, BN), num_prefix, limit, earliest,
            SCALE, SOFTCAP, WINDOW, PRECISION, UPCAST, D, BD, BN,
        )  # fmt: skip
    heads = KV_HEADS * G
    packed = within * heads + group
    corner = far * heads + head * G
    store_rows(STATE + corner * D, packed * D, d, acc, inside, D, BD)
    tl.store(TOPS + corner + packed, top, mask=inside)
    tl.store(TOTALS + corner + packed, total, mask=inside)


@triton.jit
def decode_own_kernel(
    Q, K, V, FIRSTS, LENGTHS, STATE, TOPS, TOTALS, OUT,
    num_prefix,
    q_row, q_head, k_row, k_head, k_stride, v_row, v_head, v_stride,
    KV_HEADS: tl.constexpr, G: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Outputs [B, H, D] of one row and key/value head, from the prefix's softmax state on."""
    program = tl.program_id(0)
    head = program % KV_HEADS
    row = tl.cast(program // KV_HEADS, tl.int64)
    first = tl.load(FIRSTS + row)
    length = tl.load(LENGTHS + row)
    d = tl.arange(0, BD)
    group = tl.arange(0, BM)
    inside = group < G
    query = load_rows(Q + row * q_row + head * G * q_head, group * q_head, d, inside, D, BD)
    acc = tl.zeros([BM, BD], dtype=ACC)
    top = tl.full([BM], float("-inf"), dtype=ACC)
    total = tl.zeros([BM], dtype=ACC)
    corner = (row * KV_HEADS + head) * G
    if num_prefix > 0:
        acc = load_rows(STATE + corner * D, group * D, d, inside, D, BD)
        top = tl.load(TOPS + corner + group, mask=inside, other=0.0)
        total = tl.load(TOTALS + corner + group, mask=inside, other=1.0)
    stop = first + length
    limit = tl.zeros([BM], dtype=tl.int32) + stop - 1
    start = first
    if WINDOW > 0:
        start = tl.maximum(first, stop - WINDOW)
    earliest = tl.zeros([BM], dtype=tl.int32) + start
    for n0 in range(start, stop, BN):
        acc, top, total = attend_tile(
            acc, top, total, query,
            K + row * k_row + head * k_head + tl.cast(n0, tl.int64) * k_stride,
            V + row * v_row + head * v_head + tl.cast(n0, tl.int64) * v_stride,
            k_stride, v_stride, n0 + tl.arange(0, BN), stop, limit, earliest,
            SCALE, SOFTCAP, WINDOW, PRECISION, UPCAST, D, BD, BN,
        )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # a row without any key yields 0
    store_rows(OUT + corner * D, group * D, d, acc / total[:, None], inside, D, BD)
