"""benchmarks/kill_loop.py finds nothing wrong in a few kills; it is run with more by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_end(tmp_path: Path) -> None:
    path = tmp_path / "kills.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kill_loop.py", "--kills", "5", "--json", path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert found["kills"] >= 5
    assert (found["corrupt"], found["lost_steps"], found["equal_to_unkilled"]) == (0, 0, True)
