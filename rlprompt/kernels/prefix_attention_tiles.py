"""Tile sizes of the prefix-attention kernels: one small fixed table, no autotuning.

An autotuner would tune again whenever batch or prefix change, in the middle of a rollout, and its
choice, and with it the order of every sum, would differ from run to run. The table is checked ahead
of time: `scripts/aot_report.py` compiles every entry and CI refuses spills, too much shared memory,
and kernels without matrix instructions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton

KERNELS = ("forward", "backward_query", "backward_own", "backward_prefix", "decode_shared", "decode_own")
MAX_HEAD_DIM = 256


class Tile(NamedTuple):
    """One entry of the table."""

    rows: int
    """Query rows per tile: (token, head of the key/value head's group) pairs."""
    keys: int
    """Keys per tile."""
    warps: int
    stages: int
    """Depth of the software pipeline of loads."""


INTERPRETER_TILE = Tile(16, 16, 1, 1)
"""Small, so that tiny tests cross tile borders."""


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def block_dim(head_dim: int) -> int:
    """The head dim padded to what tiles are made of."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def tile_for(kernel: str, dtype: torch.dtype, head_dim: int, share: int, device: torch.device) -> Tile:
    if interpreting():
        return INTERPRETER_TILE
    raise NotImplementedError
