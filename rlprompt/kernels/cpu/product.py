"""The product of a few rows with a frozen weight that oneDNN has packed, bit for bit oneDNN's.

A decode step is made of such products, and oneDNN waits for memory in them. Where rows are many
oneDNN is as fast, and stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOST_ROWS = 256
"""Up to so many rows the kernel's product is faster than oneDNN's (`bench_cpu.py --only rows`)."""
_CHUNKS = (512, 1024, 2048, 256, 4096)
_TRIED_NUMBERS = 2**19
"""Another order of sums rounds about one number in ten thousand to another bfloat16."""
_CHUNK_OF: dict[tuple[int, int, bool], int] = {}
_OPS: Any = torch.ops.rlprompt_cpu


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None, chunk: int) -> Tensor:
    """X W^T + b for a few rows, with the bits of oneDNN's product.

    Args:
        x: bfloat16 [B, K], dense.
        weight: [N, K] in oneDNN's layout, for which `product_chunk` has found `chunk`.
        bias: [N], or None.
        chunk: the number that `product_chunk` has found.

    Returns:
        [B, N].
    """
    out: Tensor = _OPS.packed_product(x, weight, bias, chunk)
    return out


def product_chunk(weight: Tensor, bias: Tensor | None) -> int:
    """How many inputs oneDNN sums up at a time, which `packed_product` has to do as well.

    Found by trying, once per shape: neither the layout nor the order is documented, so what counts
    is that every bit of many random products is the same. The kernels have to be loaded.

    Args:
        weight: [N, K] in oneDNN's layout.
        bias: [N], or None.

    Returns:
        0 where this weight is packed in another way, or the processor has no bfloat16 products.
    """
    outputs, inputs = weight.shape
    fits = outputs % 64 == 0 and inputs % 32 == 0
    if not fits or not _OPS.has_packed_product():
        return 0
    if torch.ops.mkldnn._nbytes(weight) != 2 * outputs * inputs:
        return 0
    shape = (outputs, inputs, bias is None)
    if shape not in _CHUNK_OF:
        _CHUNK_OF[shape] = _tried_chunk(weight, bias)
    return _CHUNK_OF[shape]


def _tried_chunk(weight: Tensor, bias: Tensor | None) -> int:
    outputs, inputs = weight.shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(-(-_TRIED_NUMBERS // outputs), inputs, generator=generator).bfloat16()
    expected = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    for chunk in (inputs, *(size for size in _CHUNKS if size < inputs)):
        if torch.equal(packed_product(x, weight, bias, chunk), expected):
            return chunk
    return 0
