"""benchmarks/load_test.py: no wrong and no dropped answer on a tiny model, with swaps in flight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.load_test import Names

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_answer_is_that_of_the_artifact_it_names(tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "load_test.py", "--tiny", "--json", path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert (found["requests"], found["wrong_prompt"], found["dropped"]) == (48, 0, 0), done.stderr
    assert found["swaps"] > 0 and found["server_exit_code"] == 0
    for key in ("ttft_p50", "ttft_p95", "tokens_per_second", "baseline_tokens_per_second"):
        assert found[key] > 0


def test_an_answer_of_a_prompt_that_the_name_had_not_then_is_noticed() -> None:
    names = Names({"a": [(0.0, 0.0, "x"), (10.0, 11.0, "y"), (20.0, 21.0, "x")]})
    assert names.may_be("a", "x", 1.0, 5.0)
    assert not names.may_be("a", "y", 1.0, 5.0)
    assert names.may_be("a", "x", 10.5, 12.0)  # the swap was being made
    assert not names.may_be("a", "x", 12.0, 15.0)
    assert names.may_be("a", "y", 12.0, 15.0)
    assert not names.may_be("a", "z", 0.0, 99.0)
