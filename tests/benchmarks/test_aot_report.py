"""What the compilers say of every shipped configuration, in a process without the interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "aot_report.py"

FIELDS = {"kernel", "arch", "config", "registers", "spill_bytes", "shared_bytes", "mma"}
KERNELS = ("forward", "backward_query", "backward_own", "backward_prefix")
DECODE = ("decode_shared", "decode_own")


def test_faults_are_spills_too_much_shared_memory_and_no_matrix_instructions() -> None:
    code = (
        "from benchmarks.aot_report import Row\n"
        "def faults(spill, shared, mma):\n"
        "    return len(Row('forward', 'sm_80', '', '', 1, spill, shared, mma).faults())\n"
        "print(faults(0, 1024, 8), faults(4, 1024, 8), faults(0, 164 * 1024, 8), faults(4, 0, 0))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert shown.stdout.split() == ["0", "1", "1", "2"], shown.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_shipped_configuration_compiles_without_fault(tmp_path: Path) -> None:
    report = tmp_path / "aot.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", str(report)],
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(report.read_text())
    assert all(row.keys() >= FIELDS for row in rows)
    wanted = {(k, a) for k in KERNELS + DECODE for a in ("sm_80", "sm_90", "gfx942")}
    assert {(row["kernel"], row["arch"]) for row in rows} == wanted
    for row in rows:
        assert row["spill_bytes"] == 0 and row["mma"] > 0 and row["registers"] > 0, row
        assert row["shared_bytes"] <= (64 if row["arch"] == "gfx942" else 99) * 1024, row
