"""A script whose extra is not installed says which one, in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HIDES = """
import importlib.abc, importlib.util, sys
hidden = {hidden!r}
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Finder())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] == hidden else real(name, package)
)
"""


@pytest.mark.parametrize(
    ("hidden", "arguments", "extra"),
    [
        ("triton", ["benchmarks/aot_report.py", "--help"], "rlprompt[triton]"),
        ("pytest", ["benchmarks/structure.py", "--help"], "rlprompt[dev]"),
        ("trl", ["-m", "benchmarks.peers.trl_setup"], "rlprompt[trl]"),
        (
            "reasoning_gym",
            ["experiments/make_reasoning_data.py", "chain_sum", "--output", "rows.jsonl"],
            "rlprompt[rules]",
        ),
    ],
    ids=["triton", "pytest", "trl", "reasoning_gym"],
)
def test_a_missing_extra_is_named(
    hidden: str, arguments: list[str], extra: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDES.format(hidden=hidden))
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert f"pip install '{extra}'" in done.stderr
