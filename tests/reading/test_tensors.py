"""Headers of safetensors files are checked before anything is allocated for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from benchmarks.fuzzing.folders import INVALID_TENSORS
from rlprompt.reading.files import UnreadableError
from rlprompt.reading.tensors import FLOATS, STORED, parse_tensors, read_tensors

IN_FORM = {"int64", "bool", "another width", "one axis", "no rows", "NaN", "3e38", "1e300"} | {
    "another name",
    "one more tensor",
}
"""Whole files; what is wrong in them depends on what they are for."""


@pytest.mark.parametrize("name", sorted(INVALID_TENSORS.keys() - IN_FORM))
def test_a_damaged_file_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_tensors(INVALID_TENSORS[name], STORED)


@pytest.mark.parametrize("name", ["bool", "int64"])
def test_other_types_are_refused_where_floats_are_wanted(name: str) -> None:
    with pytest.raises(ValueError, match="is of the type"):
        parse_tensors(INVALID_TENSORS[name], FLOATS)
    assert parse_tensors(INVALID_TENSORS[name], STORED)


def test_tensors_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4).bfloat16()}
    (tmp_path / "a.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    found = read_tensors(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with file.open("wb") as opened:
        opened.truncate(1 << 40)
    with pytest.raises(UnreadableError, match="more than"):
        read_tensors(file)
