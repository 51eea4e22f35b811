"""Files that are none, or too large, are refused at once."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from rlprompt.errors import InputError
from rlprompt.reading.files import (
    UnreadableError,
    expanded,
    in_words,
    read_bytes,
    read_text,
    require_regular,
)


def test_a_pipe_a_device_a_socket_and_a_folder_are_refused_without_waiting(tmp_path: Path) -> None:
    pipe, listening = tmp_path / "pipe", tmp_path / "socket"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(listening))
        kinds = {
            pipe: "a named pipe",
            Path("/dev/zero"): "a device",
            listening: "a socket",
            tmp_path: "a folder",
        }
        for path, kind in kinds.items():
            for read in (read_bytes, read_text, require_regular):
                with pytest.raises(UnreadableError, match=f"it is {kind}"):
                    read(path)


def test_a_link_to_a_pipe_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with pytest.raises(UnreadableError, match="named pipe"):
        read_bytes(tmp_path / "link")


def test_a_file_beyond_the_limit_is_refused_whatever_size_it_states(tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as opened:
        opened.truncate(1 << 40)  # sparse: it takes no room
    with pytest.raises(UnreadableError, match="more than 8 MiB"):
        read_bytes(file)
    assert read_bytes(Path("/proc/self/status"))  # states a size of 0
    with pytest.raises(UnreadableError, match="more than 10 bytes"):
        read_bytes(Path("/proc/self/status"), 10)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"], ids=["nul", "surrogate"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnreadableError, match="cannot be that of a file"):
        read_bytes(tmp_path / name)


def test_line_ends_become_line_feeds(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\r\ntwo\rthree\n")
    assert read_text(tmp_path / "a") == "one\ntwo\nthree\n"


def test_no_file_stays_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(UnreadableError):
            read_bytes(tmp_path / "pipe")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("path", ["~nosuchuser/x", "a\0b"], ids=["user", "nul"])
def test_a_path_that_cannot_be_one_is_one_sentence(path: str) -> None:
    with pytest.raises(InputError, match=r"is .*, "):
        expanded(path, "model.path")
    assert expanded("~/x", "model.path") == Path.home() / "x"


def test_sizes_in_words() -> None:
    assert [in_words(n) for n in (12, 1536, 8 << 20, 5 << 30)] == [
        "12 bytes",
        "1.5 KiB",
        "8 MiB",
        "5 GiB",
    ]
