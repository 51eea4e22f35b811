"""Keys and values in the order in which the C++ decode attention multiplies them.

Its products sum two numbers at a time, so operands hold pairs of neighbours along the dimension
that is summed. Keys stand in blocks of `LANES` columns, in a block pairs of dims, in a pair all
columns of the block; values in pairs of columns. A step writes one column and reads the others as
they are.

Letters: S columns, D head dim.
"""

from __future__ import annotations

from torch import Tensor

LANES = 16
"""Numbers in a vector. S is a multiple of it, and so are the head dims that the kernels take."""


def lay_out_keys(keys: Tensor) -> Tensor:
    """Keys [..., S, D] in the kernel's order, of the same shape."""
    *front, columns, dim = keys.shape
    blocks = keys.reshape(*front, columns // LANES, LANES, dim // 2, 2)
    return blocks.transpose(-3, -2).reshape(keys.shape)


def lay_out_values(values: Tensor) -> Tensor:
    """Values [..., S, D] in the kernel's order, of the same shape."""
    *front, columns, dim = values.shape
    return values.reshape(*front, columns // 2, 2, dim).transpose(-2, -1).reshape(values.shape)


def plain_keys(laid_out: Tensor) -> Tensor:
    """What `lay_out_keys` was given."""
    *front, columns, dim = laid_out.shape
    blocks = laid_out.reshape(*front, columns // LANES, dim // 2, LANES, 2)
    return blocks.transpose(-3, -2).reshape(laid_out.shape)


def plain_values(laid_out: Tensor) -> Tensor:
    """What `lay_out_values` was given."""
    *front, columns, dim = laid_out.shape
    return laid_out.reshape(*front, columns // 2, dim, 2).transpose(-2, -1).reshape(laid_out.shape)
