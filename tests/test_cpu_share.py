"""How many threads a process may have, and how they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlprompt import cpu_share
from rlprompt.cpu_share import SPIN_COUNT, allowed_cpus
from rlprompt.model import device

ROOT = Path(__file__).parent.parent
CORES = 8


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_share, "_affinity", lambda: CORES)


def groups(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A folder of control groups and the file that says which are ours."""
    for name, text in files.items():
        path = folder / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "own").write_text(own)
    return folder / "fs", folder / "own"


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1),
        ("0::/host/path\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, CORES),
        ("0::/\n", {"cpu.max": "garbage"}, CORES),
        ("0::/\n", {}, CORES),
        ("", {}, CORES),
        (
            "4:cpu,cpuacct:/j\n3:memory:/j\n",
            {"cpu/j/cpu.cfs_quota_us": "300000\n", "cpu/j/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        (
            "4:cpu,cpuacct:/j\n",
            {"cpu/j/cpu.cfs_quota_us": "-1\n", "cpu/j/cpu.cfs_period_us": "100000\n"},
            CORES,
        ),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, CORES),
    ],
    ids=[
        "of-a-parent", "rounded-down", "path-of-the-host", "no-limit", "damaged", "absent",
        "no-groups", "version-1", "version-1-no-limit", "more-than-cores",
    ],
)  # fmt: skip
def test_quotas_of_control_groups_count(
    tmp_path: Path, own: str, files: dict[str, str], cpus: int
) -> None:
    assert allowed_cpus({}, *groups(tmp_path, own, files)) == cpus


@pytest.mark.parametrize(
    ("environment", "cpus"),
    [
        ({"SLURM_CPUS_PER_TASK": "3"}, 3),
        ({"SLURM_CPUS_ON_NODE": "6", "SLURM_NTASKS_PER_NODE": "3"}, 2),
        ({"SLURM_CPUS_ON_NODE": "1", "SLURM_NTASKS_PER_NODE": "4"}, 1),
        ({"SLURM_CPUS_PER_TASK": "64"}, CORES),
        ({"SLURM_CPUS_PER_TASK": "many"}, CORES),
    ],
    ids=["per-task", "divided", "at-least-one", "more-than-cores", "no-number"],
)
def test_the_share_of_a_slurm_job_counts(
    tmp_path: Path, environment: dict[str, str], cpus: int
) -> None:
    assert allowed_cpus(environment, *groups(tmp_path, "", {})) == cpus


def test_torch_uses_no_more_threads_than_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [16]
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: used.__setitem__(0, count))
    monkeypatch.setattr(device, "allowed_cpus", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    device.use_allowed_threads()
    assert used == [16]
    monkeypatch.delenv("OMP_NUM_THREADS")
    device.use_allowed_threads()
    assert used == [4]
    monkeypatch.setattr(device, "allowed_cpus", lambda: 8)
    device.use_allowed_threads()
    assert used == [4]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, str(SPIN_COUNT)),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "passive"}, "None"),
    ],
    ids=["unset", "set", "by-policy"],
)
def test_waiting_is_bounded_before_torch_is_loaded(before: dict[str, str], after: str) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
    plain = {key: value for key, value in os.environ.items() if key not in names}
    code = (
        "import rlprompt, os, sys; rlprompt.InputError; "
        "print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**plain, **before, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.stdout.split() == ["False", after], shown.stderr
