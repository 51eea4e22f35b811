"""Memory that is not needed for now: pages of a mapped file go, and come back where they are read.

Weights from safetensors lie in the mapped file. Once they are packed, their own pages are read only
when a fingerprint is taken.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from array import array
from pathlib import Path

from torch import Tensor

_MADV_DONTNEED = 4  # of <linux/mman.h>
_PRESENT, _SWAPPED, _OF_A_FILE = 1 << 63, 1 << 62, 1 << 61
"""Of an entry of /proc/PID/pagemap (Linux, Documentation/admin-guide/mm/pagemap.rst)."""


def page_out(tensor: Tensor) -> bool:
    """Take a tensor's pages out of this process, if a file holds the same bytes.

    They are mapped again where they are read again.

    Args:
        tensor: a dense tensor on the CPU.

    Returns:
        Whether they were; False for memory that no file holds or that was written to, for less
        than a page, and on other systems than Linux.
    """
    start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    first, last = -(-start // mmap.PAGESIZE), (start + size) // mmap.PAGESIZE
    if sys.platform != "linux" or last <= first or not _are_of_a_file(first, last):
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    length = (last - first) * mmap.PAGESIZE
    return int(madvise(first * mmap.PAGESIZE, length, _MADV_DONTNEED)) == 0


def _are_of_a_file(first: int, last: int) -> bool:
    """Whether nothing would be lost: a page that was written to is no longer the file's."""
    entries = array("Q")
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            file.seek(first * entries.itemsize)
            entries.frombytes(file.read((last - first) * entries.itemsize))
    except OSError:
        return False
    present = [entry for entry in entries if entry & _PRESENT]
    swapped = any(entry & _SWAPPED for entry in entries)
    complete = len(entries) == last - first
    return complete and not swapped and bool(present) and all(e & _OF_A_FILE for e in present)
