"""What of a machine's cores is this process's, and how its threads wait for each other on them.

Threads that compute together meet hundreds of times a second. Where each has a core to itself, the
fastest way to wait is to look again and again. Where something else wants the core, that look is
what it waits for: the thread that is waited for does not run, because the one that waits does. So a
wait is a short look and then sleep: the operating system sees a free core, and moves what is left
to it. OpenMP's library looks for milliseconds, unless it is told otherwise before it is loaded.
The threads of our own kernels (`kernels/cpu/team.h`) look for a fraction of one, and then sleep.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

SPIN_COUNT = 20_000
"""Looks of a thread of OpenMP before it sleeps: a few tenths of a millisecond, which is longer than
Python needs between two operations, and a tenth of a time slice."""
_SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def bound_waiting() -> bool:
    """Have OpenMP's threads sleep after a short look; returns whether that will have an effect.

    What the environment says already stays. Must be called before torch is imported.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _SPIN_VARIABLES):
        return False
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    return True


def allowed_cpus(
    environment: Mapping[str, str] | None = None,
    control_groups: Path = Path("/sys/fs/cgroup"),
    own_groups: Path = Path("/proc/self/cgroup"),
) -> int:
    """How many threads this process can have running at once.

    The least of: the cores that it may run on (its affinity), the quota of its control groups,
    and its share of a Slurm allocation, which on clusters without confinement nothing else says.

    Args:
        environment: variables; None = those of this process.
        control_groups: the folder of the kernel's control groups.
        own_groups: the file that says which of them are this process's.
    """
    environment = os.environ if environment is None else environment
    counts = [_affinity(), _slurm_share(environment)]
    counts += [max(1, int(quota)) for quota in _quotas(control_groups, own_groups)]
    return min(count for count in counts if count is not None)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _slurm_share(environment: Mapping[str, str]) -> int | None:
    """Cores per task of the job that this process belongs to."""
    per_task = _count(environment.get("SLURM_CPUS_PER_TASK"))
    if per_task is not None:
        return per_task
    cores = _count(environment.get("SLURM_CPUS_ON_NODE"))
    tasks = _count(environment.get("SLURM_NTASKS_PER_NODE")) or 1
    return None if cores is None else max(1, cores // tasks)


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and int(text) > 0 else None


def _quotas(top: Path, own_groups: Path) -> list[float]:
    """Cores that each control group above this process may use on average."""
    try:
        lines = own_groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    quotas = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = top if not controllers else top / "cpu"
        group = Path(path.lstrip("/"))
        # In a container the path may be that of the host: what is there is read.
        for level in [group, *group.parents]:
            quota = _quota_of(root / level)
            if quota is not None:
                quotas.append(quota)
    return quotas


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        cores = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max": no limit
        return None
    return cores if cores > 0 else None
