"""LoRA beside the packed products of a frozen bf16 base on a CPU.

Layers that are multiplied as one get their low-rank parts side by side: the downs above each other,
the ups in the blocks of one matrix. One C++ kernel then adds all of them to the common output.

Letters: K inputs, O outputs, R inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from rlprompt.kernels.cpu.arranged import LANES
from rlprompt.kernels.cpu.low_rank import input_pairs, low_rank_add_
from rlprompt.types import LowRank


class Product(Protocol):
    """A frozen linear map."""

    def forward(self, x: Tensor) -> Tensor:
        """The product without autograd, in fresh memory."""
        ...

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the input, in fresh memory."""
        ...


def side_by_side(
    widths: Sequence[int], additions: Sequence[LowRank | None], dtype: torch.dtype
) -> LowRank:
    """The low-rank parts of layers whose outputs stand side by side, as one.

    Args:
        widths: outputs of each layer.
        additions: of each layer, None = none, but not all; of one adapter, so with one scale.
        dtype: of the result, through which gradients reach the parts.

    Returns:
        down [R, K] and up [O, R], R a multiple of `LANES`.
    """
    present = [addition for addition in additions if addition is not None]
    down = torch.cat([addition.down for addition in present])
    ups = [
        down.new_zeros(width, 0) if addition is None else addition.up
        for width, addition in zip(widths, additions, strict=True)
    ]
    up = ups[0] if len(ups) == 1 else torch.block_diag(*ups)
    more = -len(down) % LANES
    down, up = functional.pad(down, (0, 0, 0, more)), functional.pad(up, (0, more))
    return LowRank(down.to(dtype), up.to(dtype), present[0].scale)


def low_rank_product(x: Tensor, product: Product, addition: LowRank) -> Tensor:
    """product(x) + up(scale * down(x)), with gradients of x, down and up.

    Args:
        x: [..., K].
        product: the frozen map from K to O.
        addition: from `side_by_side`.

    Returns:
        [..., O].
    """
    down, up, scale = addition.down, addition.up, addition.scale
    needs = any(tensor.requires_grad for tensor in (x, down, up))
    if torch.is_grad_enabled() and needs:
        out: Tensor = _LowRankProduct.apply(x, product, down, up, scale)  # type: ignore[no-untyped-call]
        return out
    return _summed(x, product, down, up, scale)[0]


def _summed(
    x: Tensor, product: Product, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The sum and the inner states."""
    out = product.forward(x)
    pairs = (input_pairs(down), input_pairs(up))
    return out, low_rank_add_(_rows(out), _rows(x), *pairs, scale)


class _LowRankProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, product: Product, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        out, inner = _summed(x, product, down, up, scale)
        ctx.save_for_backward(x, inner, down, up)
        ctx.product, ctx.scale = product, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, inner, down, up = ctx.saved_tensors
        grad = _rows(grads[0])
        d_inner = (grad @ up).mul_(ctx.scale)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = ctx.product.input_gradient(grads[0])
            _rows(d_x).addmm_(d_inner, down)
        return d_x, None, d_inner.t() @ _rows(x), grad.t() @ inner, None


def _rows(x: Tensor) -> Tensor:
    """[..., n] -> [N, n], dense."""
    return x.reshape(-1, x.shape[-1]).contiguous()
