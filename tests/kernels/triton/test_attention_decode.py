"""Decoding in two launches against one masked softmax over [prefix | own columns]."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rlprompt.kernels.operands import KeyValue, Scoring, Spans
from rlprompt.kernels.oracle import rms_ratio
from rlprompt.kernels.reference import masked_attention
from tests.fixtures.attention import DEVICE

pytest.importorskip("triton")
ON_GPU = DEVICE.type == "cuda"
PLAIN = Scoring(0.2)


class Batch(NamedTuple):
    query: Tensor
    own: KeyValue
    prefix: KeyValue
    spans: Spans


# Rows that use all columns, some in the middle, one, and none.
SPANS = ((0, 21), (3, 17), (5, 1), (20, 1), (4, 0))


def batch(
    prefix: int, dtype: torch.dtype, kv_heads: int = 2, share: int = 3, dim: int = 20
) -> Batch:
    spans = SPANS if prefix else SPANS[:4]

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)

    rows = len(spans)
    firsts, lengths = torch.tensor(spans, dtype=torch.int32, device=DEVICE).unbind(1)
    return Batch(
        made(rows, kv_heads * share, dim),
        KeyValue(made(rows, kv_heads, 21, dim), made(rows, kv_heads, 21, dim)),
        KeyValue(made(kv_heads, prefix, dim), made(kv_heads, prefix, dim)),
        Spans(firsts, lengths),
    )


def truth(given: Batch, scoring: Scoring) -> Tensor:
    scaling, softcap, window = scoring
    firsts, lengths = (t.long()[:, None] for t in given.spans)
    prefix = given.prefix.key.shape[1]
    column = torch.arange(given.own.key.shape[2], device=DEVICE)[None]
    seen = (column >= firsts) & (column < firsts + lengths)
    first = torch.arange(prefix, device=DEVICE)[None].expand(len(seen), -1)
    positions = torch.cat([first, prefix + column - firsts], 1)
    seen = torch.cat([torch.ones_like(first, dtype=torch.bool), seen], 1)
    if window is not None:
        seen = seen & (prefix + lengths - 1 - positions < window)
    keys, values = (
        torch.cat([p[None].expand(len(seen), -1, -1, -1), o], 2).double()
        for p, o in zip(given.prefix, given.own, strict=True)
    )
    query = given.query.double()[:, :, None]
    return masked_attention(query, keys, values, seen[:, None], scaling, softcap)[:, :, 0]


@pytest.mark.parametrize(
    ("prefix", "options"),
    [
        (19, {}),
        (0, {}),
        (32, {"kv_heads": 1, "share": 4, "dim": 16}),
        (1, {"kv_heads": 3, "share": 1}),
        (5, {"kv_heads": 1, "share": 20}),  # more heads than a smallest tile has rows
    ],
)
def test_decoding_is_one_softmax_over_prefix_and_own(prefix: int, options: dict[str, Any]) -> None:
    from rlprompt.kernels.triton.attention import prefix_decode

    given = batch(prefix, torch.float32 if ON_GPU else torch.float64, **options)
    error = rms_ratio(truth(given, PLAIN), prefix_decode(*given, PLAIN))
    assert error < (2e-5 if ON_GPU else 1e-14)


@pytest.mark.parametrize("window", [1, 4, 25])
def test_window_and_soft_cap(window: int) -> None:
    from rlprompt.kernels.triton.attention import prefix_decode

    given = batch(11, torch.float32 if ON_GPU else torch.float64, kv_heads=1)
    scoring = Scoring(0.2, 1.5, window)
    error = rms_ratio(truth(given, scoring), prefix_decode(*given, scoring))
    assert error < (2e-5 if ON_GPU else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    from rlprompt.kernels.triton.attention import prefix_decode

    given = batch(11, dtype, kv_heads=1)
    out = prefix_decode(*given, PLAIN)
    assert out.dtype == dtype
    assert rms_ratio(truth(given, PLAIN), out) < 8e-3


def test_a_row_that_sees_nothing_is_zero() -> None:
    from rlprompt.kernels.triton.attention import prefix_decode

    given = batch(0, torch.float32)
    nothing = given.spans._replace(lengths=torch.zeros_like(given.spans.lengths))
    out = prefix_decode(given.query, given.own, given.prefix, nothing, PLAIN)
    assert torch.equal(out, torch.zeros_like(out))


def test_unseen_columns_may_hold_anything() -> None:
    from rlprompt.kernels.triton.attention import prefix_decode

    given = batch(7, torch.float32, kv_heads=1)
    before = prefix_decode(*given, PLAIN)
    for row, (first, length) in enumerate(SPANS):
        for t in given.own:
            t[row, :, :first] = float("nan")
            t[row, :, first + length :] = float("nan")
    assert torch.equal(before, prefix_decode(*given, PLAIN))
