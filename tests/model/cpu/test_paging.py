"""Pages that leave memory: only those that a file holds, and with their bytes still there."""

from __future__ import annotations

import mmap
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlprompt.model.cpu.packed_linear import PackedLinear
from rlprompt.model.cpu.paging import page_out

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that is asked")


@pytest.fixture
def mapped(tmp_path: Path) -> Tensor:
    """A weight of 8 MiB whose memory is that of a file."""
    save_file({"weight": torch.randn(1024, 4096).bfloat16()}, tmp_path / "a.safetensors")
    return load_file(tmp_path / "a.safetensors")["weight"]


def share_in_memory(tensor: Tensor) -> float:
    """The share of a tensor's pages that this process has mapped."""
    first = tensor.data_ptr() // mmap.PAGESIZE
    pages = tensor.numel() * tensor.element_size() // mmap.PAGESIZE
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(8 * first)
        entries = struct.unpack(f"{pages}Q", file.read(8 * pages))
    present = sum(int(entry) >> 63 for entry in entries)
    return present / pages


def test_a_files_pages_go_and_are_read_again(mapped: Tensor) -> None:
    before = mapped.clone()
    assert share_in_memory(mapped) == 1.0
    assert page_out(mapped)
    assert share_in_memory(mapped) < 0.01
    assert torch.equal(mapped, before)
    assert share_in_memory(mapped) == 1.0


def test_what_was_written_to_stays(mapped: Tensor) -> None:
    mapped[3] += 1.0
    before = mapped.clone()
    assert not page_out(mapped)
    assert torch.equal(mapped, before)


def test_other_memory_stays() -> None:
    own = torch.randn(1024, 1024)
    before = own.clone()
    assert not page_out(own)
    assert torch.equal(own, before)
    assert not page_out(torch.zeros(3))


def test_a_packed_layer_lets_its_weight_go_unless_something_else_reads_it(mapped: Tensor) -> None:
    linear = torch.nn.Linear(4096, 1024, bias=False)
    linear.weight = torch.nn.Parameter(mapped, requires_grad=False)
    for kept in (True, False):
        layer = PackedLinear(linear)
        if kept:
            layer.packed.keep_original()
        layer(torch.randn(2, 4096).bfloat16())
        assert share_in_memory(mapped) == 1.0
        layer.packed_input_gradient(torch.randn(2, 1024).bfloat16())
        assert share_in_memory(mapped) == 1.0 if kept else share_in_memory(mapped) < 0.01
