"""Moving packed tokens into padded rows and back, without a scatter-add.

Indexing a tensor has a scatter-add as its backward, which is slow on a CPU and not deterministic on
a GPU. Every packed token stands in exactly one padded place, so both directions are plain moves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Unfold(torch.autograd.Function):
    """Packed to padded; the backward reads each token's one place."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, index: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return packed.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grads[0].index_select(0, place), None, None


class _Fold(torch.autograd.Function):
    """Padded to packed; the backward leaves zeros in the padding."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.places = padded.shape[0]
        return padded.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        (grad,) = grads
        out = grad.new_zeros((ctx.places, *grad.shape[1:]))
        return out.index_copy_(0, place, grad), None


class _RepeatRows(torch.autograd.Function):
    """Few rows many times; the backward sums by a product with the one-hot matrix."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.sources = source.shape[0]
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        (grad,) = grads
        places = torch.arange(ctx.sources, device=index.device)
        one_hot = (places[:, None] == index[None, :]).to(grad.dtype)
        summed = one_hot @ grad.reshape(grad.shape[0], -1)
        return summed.view(ctx.sources, *grad.shape[1:]), None


def unfold(packed: Tensor, index: Tensor, place: Tensor) -> Tensor:
    """Packed tokens into padded places.

    Args:
        packed: [N, ...].
        index: int64 [M], the packed token of each place; padding may name any token, and its
            gradient is dropped.
        place: int64 [N], the one place of each packed token.

    Returns:
        [M, ...].
    """
    out: Tensor = _Unfold.apply(packed, index, place)  # type: ignore[no-untyped-call]
    return out


def fold(padded: Tensor, place: Tensor) -> Tensor:
    """Padded places [M, ...] back into packed tokens [N, ...]; padding gets zero gradient."""
    out: Tensor = _Fold.apply(padded, place)  # type: ignore[no-untyped-call]
    return out


def repeat_rows(source: Tensor, index: Tensor) -> Tensor:
    """`source[index]` for few, often repeated rows, with a deterministic sum as its backward.

    Args:
        source: [G, ...].
        index: int64 [B] into G.

    Returns:
        [B, ...].
    """
    out: Tensor = _RepeatRows.apply(source, index)  # type: ignore[no-untyped-call]
    return out
