"""Building the kernels under mishaps, with a compiler that is a shell script."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlprompt.kernels.cpu import build

ROOT = Path(__file__).parents[3]
COMPILER = """#!/bin/bash
[ "$1" = --version ] && { echo fake 1; exit; }
echo "$TMPDIR" >>"$LOG"
sleep "${SLOW:-0}"
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made >"$2"; shift; done
"""
LOAD = """
import logging, sys
from pathlib import Path
from rlprompt.kernels.cpu import build
logging.basicConfig(level=logging.INFO)
try:
    build.load(Path(sys.argv[1]))
except build.BuildError as error:
    print(error)
"""


class Builder:
    """Runs `build.load` on one folder in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "kernels", folder / "calls"
        compiler = folder / "c++"
        compiler.write_text(COMPILER)
        compiler.chmod(0o755)
        self.environment = os.environ | {
            "CXX": str(compiler),
            "LOG": str(self.log),
            "PYTHONPATH": str(ROOT),
        }

    def start(self, slow: float = 0) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", LOAD, str(self.folder)],
            env={**self.environment, "SLOW": str(slow)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self) -> str:
        told, _ = self.start().communicate(timeout=120)
        return told

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def names(self) -> list[str]:
        """What is in the folder, the library as `so`."""
        return sorted(path.suffix[1:] or path.name for path in self.folder.iterdir())


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    made = Builder(tmp_path)
    monkeypatch.setenv("CXX", made.environment["CXX"])
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    return made


ONCE = len(build.SOURCES) + 1


def test_two_processes_build_once(builder: Builder) -> None:
    both = [builder.start(slow=0.5) for _ in range(2)]
    told = [process.communicate(timeout=120)[0] for process in both]
    # The second finds a library, and that it is none: then, and only then, it is made again.
    again = sum("building them anew" in text for text in told)
    assert len(builder.calls) == ONCE * (1 + again)
    assert all("cannot be loaded" in text for text in told), told
    assert builder.names == ["lock", "so"]


def test_what_a_killed_build_left_is_cleared_away(builder: Builder) -> None:
    process = builder.start(slow=30)
    deadline = time.monotonic() + 60
    while not builder.calls:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(builder.names) == 2, builder.names
    assert "cannot be loaded" in builder.run()
    assert builder.names == ["lock", "so"]
    assert all(Path(each).parent == builder.folder for each in builder.calls), "left in TMPDIR"


def test_a_damaged_library_is_made_anew(builder: Builder) -> None:
    builder.run()
    (library,) = builder.folder.glob("*.so")
    library.write_bytes(b"")
    told = builder.run()
    assert "in the cache are damaged" in told and "building them anew" in told
    assert library.read_text() == "made\n"
    assert len(builder.calls) == 2 * ONCE


def test_a_folder_that_may_not_be_written_or_read_is_one_sentence(builder: Builder) -> None:
    if os.getuid() == 0:
        pytest.skip("the superuser may write everywhere")
    builder.folder.mkdir()
    for mode, word in ((stat.S_IRUSR | stat.S_IXUSR, "written"), (0, "read")):
        builder.folder.chmod(mode)
        told = builder.run()
        builder.folder.chmod(stat.S_IRWXU)
        assert f"cannot be {word} (Permission denied)" in told
        assert "Traceback" not in told
