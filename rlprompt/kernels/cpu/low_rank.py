"""What an adapter of low rank adds to a product: up(scale * down(x)), and its gradients.

The bits are those of three operations on bfloat16 tensors, each rounded: down, scale and up. They
do not depend on how many rows there are. Layers whose outputs stand side by side are served at
once: their inner states stand behind each other, and each output takes those of its own layer.

Letters: N rows, K inputs, O outputs, R inner states of all layers, r of one layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlprompt.kernels.cpu.cache_layout import LANES

_OPS: Any = torch.ops.rlprompt_cpu


def serves_widths(inputs: int, outputs: int) -> bool:
    """Whether the kernels add to a layer of these widths."""
    return inputs % LANES == 0 and outputs % LANES == 0


def input_pairs(weight: Tensor) -> Tensor:
    """A bfloat16 weight [n, k] in the order in which the kernels read it, int32 [k / 2, n].

    Args:
        weight: the weight, dense; n is a multiple of `LANES`, k is even.
    """
    out: Tensor = _OPS.input_pairs(weight)
    return out


def low_rank_inner(x: Tensor, down: Tensor, scale: float) -> Tensor:
    """The inner states scale * down(x), [N, R].

    Args:
        x: bfloat16 [N, K], dense.
        down: `input_pairs` of a weight [R, K]; R is a multiple of `LANES`.
        scale: factor on the inner states.
    """
    inner: Tensor = _OPS.low_rank_inner(x, down, scale)
    return inner


def low_rank_add_(out: Tensor, inner: Tensor, up: Tensor, starts: Tensor) -> None:
    """Add up(inner) to `out`, in place.

    Args:
        out: bfloat16 [N, O], dense.
        inner: inner states, from `low_rank_inner`.
        up: `input_pairs` of a weight [O, r]; r is even.
        starts: int32 [O / LANES], the inner states that each vector of outputs takes begin at twice
            this number; -1 = nothing is added to them.
    """
    _OPS.low_rank_add_(out, inner, up, starts)


def low_rank_backward(
    grad: Tensor,
    x: Tensor,
    inner: Tensor,
    down: Tensor,
    up: Tensor,
    starts: Tensor,
    scale: float,
    d_x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weights, in one order of sums for any number of threads.

    Args:
        grad: gradient of the outputs, bfloat16 [N, O], dense.
        x: [N, K], as in the forward.
        inner: [N, R], from `low_rank_inner`.
        down: bfloat16 [R, K], dense; zero behind all layers' states.
        up: bfloat16 [O, r], dense.
        starts: places of inner states, as in the forward.
        scale: factor on the inner states, as in the forward.
        d_x: [N, K], to which what reaches x is added; empty where nothing is asked for.

    Returns:
        Of down [R, K] and of up [O, r], float32.
    """
    d_down, d_up = _OPS.low_rank_backward(grad, x, inner, down, up, starts, scale, d_x)
    return d_down, d_up
