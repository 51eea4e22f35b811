"""What an adapter of low rank adds to a product, in one pass over the product's output.

The bits are those of three operations on bfloat16 tensors, each rounded: down, scale and up. They
do not depend on how many rows there are.

Letters: N rows, K inputs, O outputs, R inner width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlprompt.kernels.cpu.arranged import LANES

_OPS: Any = torch.ops.rlprompt_cpu


def serves_widths(inputs: int, outputs: int) -> bool:
    """Whether the kernel adds to a layer of these widths."""
    return inputs % 2 == 0 and outputs % LANES == 0


def input_pairs(weight: Tensor) -> Tensor:
    """A bfloat16 weight [n, k] in the order in which `low_rank_add_` reads it, int32 [k / 2, n].

    Args:
        weight: dense; n is a multiple of `LANES`, k is even.
    """
    out: Tensor = _OPS.input_pairs(weight)
    return out


def low_rank_add_(out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Add up(scale * down(x)) to `out`, in place.

    Args:
        out: bfloat16 [N, O], dense.
        x: bfloat16 [N, K], dense.
        down: `input_pairs` of a weight [R, K]; R is a multiple of `LANES`.
        up: `input_pairs` of a weight [O, R].
        scale: of the inner states.

    Returns:
        The scaled inner states, [N, R].
    """
    inner: Tensor = _OPS.low_rank_add_(out, x, down, up, scale)
    return inner
