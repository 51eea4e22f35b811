"""Tile sizes of the prefix-attention kernels: one small fixed table, no autotuning.

An autotuner would tune again whenever batch or prefix change, in the middle of a rollout, and its
choice, and with it the order of every sum, would differ from run to run. The table is checked ahead
of time: `benchmarks/aot_report.py` compiles every entry and CI refuses spills, too much shared
memory, and kernels without matrix instructions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


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


class Column(NamedTuple):
    """The tiles of all kernels for one backend, element size and head dim."""

    forward: Tile
    backward_query: Tile
    backward_keys: Tile
    """Of a row's own keys, and of the prefix."""
    decode_shared: Tile
    decode_own: Tile

    def of(self, kernel: str) -> Tile:
        """The tile of a kernel; KeyError when there is no such kernel."""
        return {
            "forward": self.forward,
            "backward_query": self.backward_query,
            "backward_own": self.backward_keys,
            "backward_prefix": self.backward_keys,
            "decode_shared": self.decode_shared,
            "decode_own": self.decode_own,
        }[kernel]


# By backend, bytes per element and padded head dim (64 also serves smaller ones). NVIDIA's entries
# stay under the 99 KB of shared memory of its smallest GPUs since Ampere, AMD's under 64 KB.
# Eight warps where a tile's accumulators would spill with four; one pipeline stage on AMD where two
# would. Float32 multiplies three times, from two halves of each number, and needs the registers:
# at head dim 256 no tile fits, and attention is written out (`dispatch`).
TILES: dict[tuple[str, int, int], Column] = {
    ("cuda", 2, 64): Column(
        Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2),
        Tile(64, 64, 4, 2), Tile(16, 64, 4, 3),
    ),
    ("cuda", 2, 128): Column(
        Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2),
        Tile(64, 64, 8, 2), Tile(16, 64, 4, 3),
    ),
    ("cuda", 2, 256): Column(
        Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2),
        Tile(64, 32, 8, 2), Tile(16, 32, 4, 2),
    ),
    ("cuda", 4, 64): Column(
        Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2),
        Tile(32, 32, 8, 2), Tile(16, 32, 4, 2),
    ),
    ("cuda", 4, 128): Column(
        Tile(32, 32, 8, 2), Tile(16, 32, 8, 2), Tile(32, 16, 8, 1),
        Tile(32, 32, 8, 2), Tile(16, 32, 4, 2),
    ),
    ("hip", 2, 64): Column(
        Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 1),
        Tile(64, 64, 4, 2), Tile(16, 64, 4, 2),
    ),
    ("hip", 2, 128): Column(
        Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 1),
        Tile(64, 64, 4, 2), Tile(16, 64, 4, 2),
    ),
    ("hip", 2, 256): Column(
        Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1),
        Tile(64, 32, 4, 2), Tile(16, 32, 4, 2),
    ),
    ("hip", 4, 64): Column(
        Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1),
        Tile(64, 32, 4, 2), Tile(16, 32, 4, 2),
    ),
    ("hip", 4, 128): Column(
        Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1),
        Tile(32, 32, 4, 2), Tile(16, 32, 4, 2),
    ),
}  # fmt: skip


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def block_dim(head_dim: int) -> int:
    """The head dim padded to what tiles are made of."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def backend_here() -> str:
    """The backend of this PyTorch: "cuda" or "hip"; "interpreter" when that runs the kernels."""
    if interpreting():
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def tile_for(kernel: str, backend: str, dtype: torch.dtype, head_dim: int, share: int) -> Tile:
    """The tile of a kernel for heads of `head_dim`, `share` query heads per key/value head.

    Raises:
        ValueError: there is none.
    """
    if backend == "interpreter":
        tile = INTERPRETER_TILE
    else:
        found = TILES.get((backend, dtype.itemsize, max(64, block_dim(head_dim))))
        if found is None:
            raise ValueError(f"no tiles for {dtype} and head dim {head_dim} on {backend}")
        tile = found.of(kernel)
    if kernel == "decode_own":  # its rows are the heads of one group, padded to a power of two
        tile = tile._replace(rows=max(tile.rows, int(triton.next_power_of_2(share))))
    return tile
