"""Moves between packed and padded rows against plain indexing, forward and gradient."""

from __future__ import annotations

import torch

from rlprompt.kernels.gather import fold, repeat_rows, unfold

# Rows of 2, 0 and 3 tokens in a width of 3.
PLACE = torch.tensor([0, 1, 6, 7, 8])
INDEX = torch.tensor([0, 1, 0, 0, 0, 0, 2, 3, 4])
REAL = torch.tensor([1, 1, 0, 0, 0, 0, 1, 1, 1], dtype=torch.float64)


def _packed() -> torch.Tensor:
    return torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)


def test_unfold_and_fold_undo_each_other() -> None:
    packed = _packed()
    padded = unfold(packed, INDEX, PLACE)
    assert padded.shape == (9, 2, 3)
    assert torch.equal(padded[PLACE], packed)
    assert torch.equal(fold(padded, PLACE), packed)


def test_gradient_of_unfold_is_that_of_indexing_where_padding_counts_for_nothing() -> None:
    packed = _packed()
    upstream = torch.randn(9, 2, 3, dtype=torch.float64) * REAL[:, None, None]
    (grad,) = torch.autograd.grad((unfold(packed, INDEX, PLACE) * upstream).sum(), packed)
    (expected,) = torch.autograd.grad((packed[INDEX] * upstream).sum(), packed)
    assert torch.equal(grad, expected)


def test_padding_gets_and_gives_no_gradient() -> None:
    packed = _packed()
    (grad,) = torch.autograd.grad(unfold(packed, INDEX, PLACE).sum(), packed)
    assert torch.equal(grad, torch.ones_like(grad))  # token 0 stands in the padding four times
    padded = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(fold(padded, PLACE).sum(), padded)
    assert torch.equal(grad, REAL[:, None, None].expand_as(grad))


def test_gradients_agree_with_finite_differences() -> None:
    packed = _packed()
    padded = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([1, 1, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda x: fold(unfold(x, INDEX, PLACE) ** 2, PLACE), packed)
    assert torch.autograd.gradcheck(lambda x: fold(x, PLACE), padded)
    assert torch.autograd.gradcheck(lambda x: repeat_rows(x, index), packed[:3])


def test_repeat_rows_is_indexing() -> None:
    source = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 0, 2, 2])
    assert torch.equal(repeat_rows(source, index), source[index])
    upstream = torch.randn(4, 2, 4, dtype=torch.float64)
    (grad,) = torch.autograd.grad((repeat_rows(source, index) * upstream).sum(), source)
    (expected,) = torch.autograd.grad((source[index] * upstream).sum(), source)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-14)
