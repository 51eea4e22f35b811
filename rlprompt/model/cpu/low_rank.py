"""LoRA beside the packed products of a frozen bf16 base on a CPU.

Layers that are multiplied as one get their low-rank parts side by side: the downs above each other,
the ups one behind the other. The C++ kernels add all of them to the common output.

Letters: N rows, K inputs, O outputs, R inner states of all layers, r of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlprompt.kernels.cpu.cache_layout import LANES
from rlprompt.kernels.cpu.low_rank import (
    input_pairs,
    low_rank_add_,
    low_rank_backward,
    low_rank_inner,
)
from rlprompt.model.cpu.rollout_products import Product, ProductRows
from rlprompt.types import LowRank


@dataclass(frozen=True)
class SideBySide:
    """The low-rank parts of layers whose outputs stand side by side, for the kernels.

    down: bfloat16 [R, K], R a multiple of `LANES`; rows behind those of all layers are zero.
    up: bfloat16 [O, r], r even; zero where a layer has no part.
    starts: see `low_rank_add_`.
    """

    down: Tensor
    up: Tensor
    starts: Tensor
    scale: float

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Down and up as the kernels of the forward read them."""
        return input_pairs(self.down), input_pairs(self.up)


@torch.no_grad()
def side_by_side(widths: Sequence[int], additions: Sequence[LowRank | None]) -> SideBySide:
    """Copies of the low-rank parts of several layers, as one.

    Args:
        widths: outputs of each layer, multiples of `LANES`.
        additions: low-rank parts of each layer, None = none, but not all; of one adapter, so with
            one rank and one scale.
    """
    present = [addition for addition in additions if addition is not None]
    rank, inputs = present[0].down.shape
    even = rank + rank % 2
    states = -(-even * len(present) // LANES) * LANES
    down = torch.zeros(states, inputs, dtype=torch.bfloat16)
    up = torch.zeros(sum(widths), even, dtype=torch.bfloat16)
    row = column = 0
    for width, addition in zip(widths, additions, strict=True):
        if addition is not None:
            down[row : row + rank] = addition.down
            up[column : column + width, :rank] = addition.up
            row += even
        column += width
    absent = tuple(addition is None for addition in additions)
    return SideBySide(down, up, _starts(tuple(widths), absent, even // 2), present[0].scale)


@cache
def _starts(widths: tuple[int, ...], absent: tuple[bool, ...], pairs: int) -> Tensor:
    """See `low_rank_add_`; `pairs` of inner states belong to each layer that has a part."""
    starts = []
    start = 0
    for width, missing in zip(widths, absent, strict=True):
        starts += [-1 if missing else start] * (width // LANES)
        start += 0 if missing else pairs
    return torch.tensor(starts, dtype=torch.int32)


def low_rank_product(
    x: Tensor,
    product: Product,
    widths: Sequence[int],
    additions: Sequence[LowRank | None],
    products: ProductRows | None = None,
) -> Tensor:
    """product(x) + up(scale * down(x)), with gradients of x and of the low-rank parts.

    Args:
        x: [..., K].
        product: the frozen map from K to O.
        widths: outputs of the layers that it joins.
        additions: low-rank parts of these layers; see `side_by_side`.
        products: what is known of the sum; None = all of it is computed.

    Returns:
        [..., O].
    """
    leaves = [t for part in additions if part is not None for t in (part.down, part.up)]
    joined = side_by_side(widths, additions)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *leaves)):
        out: Tensor = _LowRankProduct.apply(x, product, joined, widths, products, *leaves)  # type: ignore[no-untyped-call]
        return out
    return _summed(x, product, joined, products)[0]


def _summed(
    x: Tensor, product: Product, joined: SideBySide, products: ProductRows | None
) -> tuple[Tensor, Tensor]:
    """The sum and the inner states; what a rollout has kept is the sum already."""
    down, up = joined.pairs()
    inner = low_rank_inner(_rows(x), down, joined.scale)
    out, count = product.forward_or_take(x, products)
    low_rank_add_(_rows(out)[:count], inner[:count], up, joined.starts)
    return out, inner


class _LowRankProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        product: Product,
        joined: SideBySide,
        widths: Sequence[int],
        products: ProductRows | None,
        *leaves: Tensor,
    ) -> Tensor:
        out, inner = _summed(x, product, joined, products)
        ctx.save_for_backward(x, inner)
        ctx.product, ctx.joined, ctx.widths, ctx.rank = product, joined, widths, len(leaves[0])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner = ctx.saved_tensors
        joined: SideBySide = ctx.joined
        d_x = ctx.product.input_gradient(grads[0]) if ctx.needs_input_grad[0] else None
        added = x.new_empty(0) if d_x is None else _rows(d_x)
        rows = (_rows(grads[0]), _rows(x), inner)
        d_down, d_up = low_rank_backward(
            *rows, joined.down, joined.up, joined.starts, joined.scale, added
        )
        return d_x, None, None, None, None, *_parted(d_down, d_up, joined, ctx.widths, ctx.rank)


def _parted(
    d_down: Tensor, d_up: Tensor, joined: SideBySide, widths: Sequence[int], rank: int
) -> list[Tensor]:
    """The gradients of each layer's down and up, where it has them."""
    parts = []
    column = 0
    for width in widths:
        start = int(joined.starts[column // LANES])
        if start >= 0:
            parts += [d_down[2 * start :][:rank], d_up[column : column + width, :rank]]
        column += width
    return parts


def _rows(x: Tensor) -> Tensor:
    """[..., n] -> [N, n], dense."""
    return x.reshape(-1, x.shape[-1]).contiguous()
