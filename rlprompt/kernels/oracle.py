"""Prefix attention written out row by row: the ground truth that the Triton kernels are judged by.

No tiles, no online softmax, no packing tricks: each row's visible keys are put behind each other
and a softmax is taken. It works in any dtype, float64 included, and autograd gives its gradients.

Letters: N packed tokens, R rows, P prefix tokens, H heads, H_kv key/value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlprompt.kernels.operands import KeyValue, Packed, Scoring


def oracle_attention(packed: Packed, prefix: KeyValue, rows: Tensor, scoring: Scoring) -> Tensor:
    """Softmax attention of packed rows over [prefix, the row's parent, own tokens causally].

    Args:
        packed: queries, keys and values of the tokens.
        prefix: keys and values [H_kv, P, D] that every token sees.
        rows: int [R, >= 4]: first own token, end of own tokens, first and end of the parent's
            tokens (equal when there is no parent). Every token belongs to one row.
        scoring: how scores come about; for its window, positions count prefix, parent, own.

    Returns:
        [N, H, D].
    """
    query, key, value = packed
    scaling, softcap, window = scoring
    heads, dim = query.shape[1:]
    share = heads // key.shape[1]
    out = query.new_zeros(query.shape)
    for first, end, parent_first, parent_end, *_ in rows.tolist():
        spans = [slice(parent_first, parent_end), slice(first, end)]
        keys = torch.cat([prefix.key.transpose(0, 1), *(key[s] for s in spans)])
        values = torch.cat([prefix.value.transpose(0, 1), *(value[s] for s in spans)])
        keys, values = (t.repeat_interleave(share, 1) for t in (keys, values))  # [S, H, D]
        length, total = end - first, keys.shape[0]
        scores = torch.einsum("thd,shd->hts", query[first:end], keys) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(total, device=query.device)
        back = (place[total - length :, None] - place[None]).expand(length, total)
        seen = back >= 0 if window is None else (back >= 0) & (back < window)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        attended = torch.einsum("hts,shd->thd", weights, values)
        out = torch.cat([out[:first], attended, out[end:]])
    assert out.shape[2] == dim
    return out


def rms_ratio(truth: Tensor, other: Tensor) -> float:
    """RMS of the difference relative to the RMS of `truth`; 0 when both are zero or empty.

    A relative measure over the whole tensor: single elements near zero do not decide it.
    """
    if truth.numel() == 0:
        return 0.0
    exact = truth.double()
    error = (other.double() - exact).square().mean().sqrt().item()
    size = exact.square().mean().sqrt().item()
    return error if size == 0 else error / size
