"""Output that nobody reads any more, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HELD = """
import logging, os, sys, time
from rlprompt.standard_streams import hold_standard_streams, outlive_output
hold_standard_streams()
hold_standard_streams()
logging.basicConfig(stream=sys.stdout)
"""


def python(code: str, shell: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose streams are as a shell line makes them; `$RUN` is the process."""
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail\nRUN() {{ "$PYTHON" -c "$CODE"; }}\n{shell}'],
        env={**os.environ, "PYTHON": sys.executable, "CODE": HELD + code, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


WORK = """
outlive_output()
for number in range(2000):
    print("line", number, flush=True)
    logging.warning("record %d", number)
    print("note", file=sys.stderr) if number == 1999 else None
open(os.environ["DONE"], "w").write("all")
sys.exit(3)
"""


@pytest.mark.parametrize(
    ("shell", "told"),
    [
        ("RUN | head -1", 1),
        ("RUN > /dev/full", 1),
        ("RUN >&-", 0),
        ("RUN 2>/dev/full >/dev/null", 0),
        ("RUN 2>&1 >/dev/null | true", 0),
        ("RUN 2>&1 | head -1", 0),
        ("RUN 2>&- >/dev/null", 0),
        ("RUN <&- >&- 2>&-", 0),
    ],
)
def test_work_goes_on_without_its_streams(
    shell: str, told: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DONE", str(tmp_path / "done"))
    done = python(WORK, shell)
    assert done.returncode == 3
    assert (tmp_path / "done").read_text() == "all"
    assert done.stderr.count("the command goes on without it") == told
    assert "Traceback" not in done.stderr and "Logging error" not in done.stderr
    assert len(done.stderr.splitlines()) <= told + 1


@pytest.mark.parametrize(
    ("shell", "code", "words"),
    [
        ("RUN | head -1", 1, ""),
        ("RUN > /dev/full", 1, "error: the output cannot be written (No space left on device)\n"),
        ("RUN >&-", 0, ""),
        ("RUN | cat", 0, ""),
    ],
)
def test_what_only_shows_something_ends_quietly(shell: str, code: int, words: str) -> None:
    done = python("for number in range(100_000):\n    print(number)\nsys.stdout.flush()", shell)
    assert (done.returncode, done.stderr) == (code, words)


def test_files_do_not_take_the_numbers_of_closed_streams(tmp_path: Path) -> None:
    code = f"file = open({str(tmp_path / 'f')!r}, 'w')\nassert file.fileno() > 2\nos.write(1, b'x')"
    assert python(code, "RUN <&- >&- 2>&-").returncode == 0
    assert (tmp_path / "f").read_text() == ""


def test_text_reaches_a_living_stream_as_it_is() -> None:
    done = python("print('é', end='')\nsys.stdout.write('a\\n')\nprint(input())", "echo in | RUN")
    assert (done.stdout, done.stderr) == ("éa\nin\n", "")
