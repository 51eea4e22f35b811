"""Masked softmax attention written out: the ground truth, and the fast path on a CPU.

Letters: B rows, H query heads, H_kv key/value heads, T queries per row, S keys per row, D head dim.

Written out in matrix products, attention is 2 to 4 times faster on a CPU than
`scaled_dot_product_attention` once its backward is counted (docs/log.md), because the flash kernel
recomputes scores in small blocks. It works in any dtype, float64 included, so tests use it to judge
every other implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention of every row over its own keys (Vaswani et al., 2017, eq. 1).

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, S, D]; H is a multiple of H_kv (grouped-query attention).
        value: [B, H_kv, S, D].
        mask: a bool mask, broadcastable to [B, T, S], True = the key is seen; or the same as an
            additive bias made by `mask_bias`, where many layers share one; None = all keys are
            seen. A query that sees no key returns about the mean of the values, never NaN.
        scaling: factor on the scores, usually D ** -0.5.
        softcap: the soft cap, by which scores become softcap * tanh(scores / softcap) before the
            mask (Gemma); None = no cap.

    Returns:
        [B, H, T, D] in the dtype of `query`.
    """
    rows, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    share = heads // kv_heads
    folded = (query * scaling).reshape(rows * kv_heads, share * queries, dim)
    flat_key = key.reshape(rows * kv_heads, keys, dim)
    scores = torch.bmm(folded, flat_key.transpose(1, 2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        bias = mask_bias(mask, scores.dtype) if mask.dtype == torch.bool else mask
        scores.view(rows, kv_heads, share, queries, keys).add_(bias[:, None, None])
    weights = torch.softmax(scores, dim=-1)
    out = torch.bmm(weights, value.reshape(rows * kv_heads, keys, dim))
    return out.view(rows, heads, queries, dim)


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as an additive bias: 0 where seen, half the dtype's lowest value elsewhere.

    The other half is left for the score: a sum of -inf everywhere would make a row NaN (float16).
    """
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, torch.finfo(dtype).min / 2)
