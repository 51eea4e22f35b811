"""Commands whose output nobody reads to its end, as shell lines; `RUN` is `rlprompt`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.runs import write_recipe

ROOT = Path(__file__).parents[2]


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail\nRUN() {{ "$PYTHON" -m rlprompt "$@"; }}\n{line}'],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


GOES_ON = "the command goes on without it"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("streams", "lines"),
    [
        ("| head -1", [f"the output is read by nobody any more: {GOES_ON}"]),
        ("2>&1 | head -1", []),
        (">&- 2>&-", []),
        (
            "> /dev/full",
            [f"the output cannot be written (No space left on device): {GOES_ON}"],
        ),
    ],
)
def test_a_run_goes_on_to_its_end(
    streams: str, lines: list[str], model_dir: Path, tmp_path: Path
) -> None:
    write_recipe(tmp_path, model_dir, rewards__0__isolation={})
    reward = tmp_path / "reward.py"
    reward.write_text("import sys\nprint('loaded')\n" + reward.read_text())
    reward.write_text(reward.read_text().replace("return", "print('scored', flush=True); return"))
    done = shell(f"RUN train recipe.yaml --output run {streams}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "scored" not in line][-1:] == lines
    assert "Traceback" not in done.stderr and "Logging error" not in done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert (tmp_path / "run" / "artifact" / "prompt.json").is_file()


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("RUN schema | head -1", None),
        ("RUN schema > /dev/full", 1),
        ("RUN schema >&-", 0),
        ("RUN --version > /dev/full", 1),
        ("RUN train --help 2>/dev/full | true", None),
        ("RUN train nothing.yaml 2>&-", 2),
    ],
)
def test_what_shows_something_ends_without_noise(
    line: str, code: int | None, tmp_path: Path
) -> None:
    done = shell(line, tmp_path)
    if code is not None:
        assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) <= 1
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert ("No space left" in done.stderr) == (code == 1 and "/dev/full" in line)


@pytest.mark.slow
def test_a_chat_ends_without_noise(finished: Path, tmp_path: Path) -> None:
    done = shell(f"RUN chat {finished / 'artifact'} -q rain -q sun -q land | head -1", tmp_path)
    assert done.returncode == 1
    assert done.stderr == ""
