"""The order of keys and values that the decode attention reads."""

from __future__ import annotations

import torch

from rlprompt.kernels.cpu.cache_layout import (
    LANES,
    lay_out_keys,
    lay_out_values,
    plain_keys,
    plain_values,
)

COLUMNS, DIM = 3 * LANES, 32


def test_keys_stand_in_blocks_of_pairs_of_dims() -> None:
    keys = torch.arange(2 * COLUMNS * DIM).view(2, COLUMNS, DIM)
    blocks = lay_out_keys(keys).view(2, COLUMNS // LANES, DIM // 2, LANES, 2)
    for column in (0, LANES - 1, LANES, COLUMNS - 1):
        for dim in (0, 1, DIM - 2, DIM - 1):
            there = blocks[1, column // LANES, dim // 2, column % LANES, dim % 2]
            assert there == keys[1, column, dim]


def test_values_stand_in_pairs_of_columns() -> None:
    values = torch.arange(2 * COLUMNS * DIM).view(2, COLUMNS, DIM)
    pairs = lay_out_values(values).view(2, COLUMNS // 2, DIM, 2)
    for column in (0, 1, COLUMNS - 2, COLUMNS - 1):
        for dim in (0, 5, DIM - 1):
            assert pairs[1, column // 2, dim, column % 2] == values[1, column, dim]


def test_there_and_back() -> None:
    x = torch.randn(2, 3, COLUMNS, DIM)
    assert torch.equal(plain_keys(lay_out_keys(x)), x)
    assert torch.equal(plain_values(lay_out_values(x)), x)
