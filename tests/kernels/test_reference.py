"""Attention written out against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rlprompt.kernels.reference import masked_attention


def _inputs(dtype: torch.dtype = torch.float64, heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(3, heads, 5, 8, dtype=dtype, requires_grad=True)
    key = torch.randn(3, 2, 7, 8, dtype=dtype, requires_grad=True)
    value = torch.randn(3, 2, 7, 8, dtype=dtype, requires_grad=True)
    return query, key, value


def _mask() -> Tensor:
    mask = torch.rand(3, 5, 7) < 0.6
    mask[:, :, 0] = True
    return mask


@pytest.mark.parametrize("heads", [2, 4, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_sdpa_with_gradients(heads: int, masked: bool) -> None:
    inputs = _inputs(heads=heads)
    mask = _mask() if masked else None
    ours = masked_attention(*inputs, mask, scaling=0.3)
    theirs = functional.scaled_dot_product_attention(
        *inputs, attn_mask=None if mask is None else mask[:, None], scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    upstream = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * upstream).sum(), inputs)
    expected = torch.autograd.grad((theirs * upstream).sum(), inputs)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-12)


def test_softcap_comes_before_the_mask() -> None:
    query, key, value = _inputs()
    mask = _mask()
    ours = masked_attention(query, key, value, mask, 0.5, softcap=2.0)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.5
    scores = 2.0 * torch.tanh(scores / 2.0)
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    expected = weights @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * upstream).sum(), (query, key, value))
    wanted = torch.autograd.grad((expected * upstream).sum(), (query, key, value))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-12)


def test_one_mask_row_serves_all_queries() -> None:
    query, key, value = _inputs()
    mask = _mask()[:, :1]
    wide = masked_attention(query, key, value, mask.expand(-1, 5, -1), 0.5)
    assert torch.equal(masked_attention(query, key, value, mask, 0.5), wide)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_a_query_that_sees_nothing_is_finite_and_so_are_the_gradients(dtype: torch.dtype) -> None:
    inputs = _inputs(dtype)
    inputs[0].data.fill_(4.0)  # scores of -128 push a masked one past the range of float16
    inputs[1].data.fill_(-4.0)
    mask = _mask()
    mask[1] = False
    out = masked_attention(*inputs, mask, 1.0)
    assert torch.isfinite(out).all()
    mean = inputs[2][1].mean(1).repeat_interleave(2, 0)[:, None].expand(-1, 5, -1)
    torch.testing.assert_close(out[1], mean, rtol=0.05, atol=0.02)
    seen = torch.ones_like(out)
    seen[1] = 0
    for grad in torch.autograd.grad((out * seen).sum(), inputs):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unseen_keys_change_nothing_at_all(dtype: torch.dtype) -> None:
    query, key, value = _inputs(dtype)
    mask = _mask()
    mask[:, :, 4:] = False
    out = masked_attention(query, key, value, mask, 0.5)
    other_key, other_value = key.detach().clone(), value.detach().clone()
    other_key[:, :, 4:] = 50.0
    other_value[:, :, 4:] = -1e4
    assert torch.equal(masked_attention(query, other_key, other_value, mask, 0.5), out)


def test_views_that_are_not_contiguous_give_the_same() -> None:
    query, key, value = _inputs()
    block = torch.cat([key, torch.randn(3, 2, 4, 8, dtype=torch.float64)], dim=2)
    strided = masked_attention(
        query.transpose(1, 2).contiguous().transpose(1, 2), block[:, :, :7], value, None, 0.5
    )
    torch.testing.assert_close(strided, masked_attention(query, key, value, None, 0.5))
