"""Products whose rows do not depend on how many there are beside them.

oneDNN chooses another order of sums for few rows, and where it multiplies with AMX no kernel of
ours gives its bits (`kernels.cpu.product`). Who answers many clients at once wants the answer of
one not to depend on the others: every product is then one of exactly `ROWS` rows, the last ones
zeros.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from rlprompt.model.cpu.packed_linear import PackedLinear, PackedWeight

logger = logging.getLogger(__name__)

ROWS = 64
"""Rows of every product: as many as one decode step of a busy server has."""


def fix_rows(model: nn.Module) -> bool:
    """Let the packed products of a model give a row the same bits beside any others.

    Args:
        model: a base after `pack_linears`.

    Returns:
        Whether all its products do; False = some are not packed, and sums may differ in their last
        digits with the number of rows.
    """
    weights = packed_weights(model)
    plain = [m for m in model.modules() if type(m) is nn.Linear]
    if plain or not weights:
        logger.info("products of a row depend on their number: %d are not packed", len(plain))
        return False
    shapes: set[tuple[int, int]] = set()
    for weight in weights:
        if weight.chunk:  # a kernel of ours multiplies, row by row
            continue
        weight.block_rows = ROWS
        shape = (weight.outputs, weight.inputs)
        if shape not in shapes and not _is_independent(weight):
            logger.warning("a product of %s x %s depends on the rows beside", *shape)
            return False
        shapes.add(shape)
    return True


def fixed_rows(model: nn.Module) -> int:
    """The number of rows of every product of a model, or 1 where any number gives the same bits.

    Args:
        model: a base.
    """
    return max((weight.block_rows or 1 for weight in packed_weights(model)), default=1)


def packed_weights(model: nn.Module) -> list[PackedWeight]:
    """The products of a model that are packed and in use.

    Args:
        model: a base.
    """
    found: list[PackedWeight] = []
    inside: set[int] = set()
    for module in model.modules():
        packed = getattr(getattr(module, "joined", None), "packed", None)
        if isinstance(packed, PackedWeight):
            found.append(packed)
            inside |= {id(layer) for layer in packed.layers}
    linears = (m for m in model.modules() if isinstance(m, PackedLinear) and id(m) not in inside)
    return [*found, *(linear.packed for linear in linears)]


def _is_independent(weight: PackedWeight) -> bool:
    """Whether a row gives the same bits in another place, and beside zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, weight.inputs, generator=generator).bfloat16()
    order = torch.randperm(ROWS, generator=generator)
    with torch.no_grad():
        whole = weight.forward(x)
        turned = weight.forward(x[order].contiguous())
        alone = weight.forward(x[:1].contiguous())
    return torch.equal(turned, whole[order]) and torch.equal(alone, whole[:1])
