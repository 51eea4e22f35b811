"""A GGUF file may say anything: what does not hold together is one reason, and costs no memory."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from rlprompt.reading import gguf_file
from rlprompt.reading.files import UnreadableError
from rlprompt.reading.gguf_file import BLOCKS, GgufError, GgufFile
from tests.fixtures.gguf_bytes import items, line, pair, text, whole

HUGE = 1 << 62
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it ends in its first four bytes"),
    "another format": (whole(magic=b"GGML"), "does not begin with the letters GGUF"),
    "a zip": (b"PK\3\4" + b"\0" * 64, "does not begin with the letters GGUF"),
    "a web page": (b"<!DOCTYPE html><html>", "does not begin with the letters GGUF"),
    "version 1": (whole(version=1), "has version 1"),
    "version 4": (whole(version=4), "has version 4"),
    "big-endian": (whole(version=3 << 24), "big-endian"),
    "only letters": (b"GGUF", "it ends in its version"),
    "counts cut off": (whole()[:12], "it ends in the number of its tensors"),
    "huge tensor count": (whole(counts=(HUGE, 0)), "would have 4,611,686,018,427,387,904 tensors"),
    "many tensors": (whole(counts=(90_000, 0)), "90,000 tensors, and is too short"),
    "huge value count": (whole(counts=(0, HUGE)), "values, and 10,000 is the most"),
    "many values": (whole(counts=(0, 9_000)), "9,000 values, and is too short"),
    "long key": (whole((text(b"a", 1 << 40),)), "a key would have 1,099,511,627,776 bytes"),
    "a key that is cut off": (whole((text(b"a", 1000) + b"\0" * 13,)), "it ends in a key"),
    "a key in no UTF-8": (whole((pair(b"\xff", 4, b"\0" * 4),)), "a key is not UTF-8"),
    "a key twice": (whole((pair("k", 4, b"\0" * 4),) * 2), "the key 'k' stands twice"),
    "an unknown type": (whole((pair("k", 77, b"\0" * 8),)), "of the type 77"),
    "a long text": (whole((pair("k", 8, text(b"a", HUGE)),)), "value of 'k' would have"),
    "no UTF-8": (whole((pair("k", 8, text(b"\xc3\x28")),)), "value of 'k' is not UTF-8"),
    "a list in a list": (whole((pair("k", 9, items(9, 1, items(4, 1))),)), "list of the type 9"),
    "a huge list": (whole((pair("k", 9, items(4, HUGE)),)), "items in 'k', and 4,000,000"),
    "a long list": (whole((pair("k", 9, items(4, 3_000_000)),)), "is too short for them"),
    "many texts": (whole((pair("k", 9, items(8, 3_000_000)),)), "is too short for them"),
    "alignment 0": (whole((pair("general.alignment", 4, b"\0" * 4),)), "not a power of two"),
    "alignment 48": (whole((pair("general.alignment", 4, b"\x30\0\0\0"),)), "not a power of two"),
    "alignment 2^31": (whole((pair("general.alignment", 4, b"\0\0\0\x80"),)), "power of two"),
    "an alignment in words": (whole((pair("general.alignment", 8, text("32")),)), "power of two"),
    "no axes": (whole((), (line(axes=()),)), "would have 0 axes"),
    "nine axes": (whole((), (line(axes=(1,) * 9),)), "would have 9 axes"),
    "an axis of 0": (whole((), (line(axes=(4, 0)),)), "would have the shape"),
    "a huge axis": (whole((), (line(axes=(HUGE, 2)),)), "would have the shape"),
    "huge together": (whole((), (line(axes=(1 << 32,) * 4),)), "ends before its tensor 'a'"),
    "an unknown storage": (whole((), (line(kind=99),)), "stored as type 99"),
    "integers": (whole((), (line(kind=26),)), "stored as type 26"),
    "a broken block": (whole((), (line(axes=(33, 1), kind=2),)), "no multiple of the 32"),
    "a long name": (whole((), (line(name="a" * 300),)), "name of a tensor would have 300"),
    "between places": (whole((), (line(offset=4),)), "between aligned places"),
    "outside": (whole((), (line(offset=1 << 40),)), "ends before its tensor 'a'"),
    "far outside": (whole((), (line(offset=(1 << 64) - 32),)), "ends before its tensor 'a'"),
    "cut short": (whole((), (line(),), data=31), "ends before its tensor 'a'"),
    "twice": (whole((), (line(), line(offset=32)), data=64), "'a' stands twice"),
    "the same place": (whole((), (line(), line("b"))), "tensors 'a' and 'b' overlap"),
    "overlapping": (
        whole((), (line(axes=(16, 1)), line("b", offset=32)), data=96),
        "tensors 'a' and 'b' overlap",
    ),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_damaged_file_has_one_reason(name: str, tmp_path: Path) -> None:
    content, reason = BAD[name]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(GgufError) as caught:
        GgufFile(tmp_path / "a.gguf")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_every_place_where_a_file_can_end_is_an_error(tmp_path: Path) -> None:
    pairs = (pair("k", 8, text("v")), pair("l", 9, items(8, 2, text("x") + text("yz"))))
    content = whole(pairs, (line(), line("b", offset=32)), data=64)
    path = tmp_path / "a.gguf"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(GgufError):
            GgufFile(path)
    path.write_bytes(content)
    with GgufFile(path) as file:
        assert file.values == {"k": "v", "l": ["x", "yz"]}
        assert file.tensors["b"].shape == (2, 4)
        assert b"".join(file.rows(file.tensors["b"], 20)) == b"\1" * 32


def test_any_one_byte_may_be_another(tmp_path: Path) -> None:
    pairs = (pair("k", 4, b"\1\0\0\0"), pair("l", 9, items(6, 2, b"\0" * 8)))
    content = whole(pairs, (line(), line("b", offset=32)), data=64)
    path = tmp_path / "a.gguf"
    for place in range(0, len(content) - 64):
        for value in (0, 0x7F, 0xFF):
            path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            try:
                with GgufFile(path) as file:
                    assert sum(tensor.num_bytes for tensor in file.tensors.values()) <= len(content)
            except GgufError:
                pass


def test_a_sparse_file_of_a_terabyte_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    claims: list[bytes] = [
        whole(counts=(0, 1)) + b"\xff" * 6,
        whole((text(b"k", 1 << 16),)),
        whole((pair("k", 8, text(b"a", 200 << 20)),)),
        whole((pair("k", 9, items(12, 4_000_000)),) * 1),
        whole((), (line(axes=(1 << 32, 1 << 4)),)),
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in claims:
        path.write_bytes(content)
        with path.open("r+b") as opened:
            opened.truncate(1 << 40)
        with contextlib.suppress(GgufError), GgufFile(path):
            pass
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000  # KiB: the list of four million numbers


def test_a_header_may_not_be_larger_than_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "HEADER_BYTES", 128)
    (tmp_path / "a.gguf").write_bytes(whole((pair("k", 8, text("v" * 120)),)))
    with pytest.raises(GgufError, match="header would have more than 128 bytes"):
        GgufFile(tmp_path / "a.gguf")


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(whole((), (line(axes=(256, 64)),), data=256 * 64 * 4))
    with GgufFile(path) as file:
        rows = file.rows(file.tensors["a"], 1024)
        next(rows)
        with path.open("r+b") as opened:
            opened.truncate(4096)
        with pytest.raises(GgufError, match="has become shorter while its tensor a was read"):
            list(rows)


@pytest.mark.parametrize(
    "make", [lambda p: p.mkdir(), lambda p: __import__("os").mkfifo(p)], ids=["a folder", "a pipe"]
)
def test_what_is_no_file_is_not_waited_for(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "a.gguf")
    with pytest.raises(UnreadableError, match="it is a"):
        GgufFile(tmp_path / "a.gguf")


def test_sizes_of_blocks_are_those_of_the_package() -> None:
    import gguf

    for number, (name, in_block, size) in BLOCKS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (in_block, size))
