"""The queue: handing scripts to Slurm and asking what became of them.

Accounting (sacct) is off on many clusters, so nothing depends on it: the controller knows the jobs
of the last minutes, and what ended before that says so in its own files.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlprompt.errors import InputError

_SECONDS = 60
_SQUEUE = ("squeue", "--noheader", "--array", "--states=all", "--format=%i|%A|%T|%r|%N")
ENDED_WELL = "COMPLETED"
ENDED_BADLY = (
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "DEADLINE",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "NODE_FAIL",
    "PREEMPTED",
    "REVOKED",
    "LAUNCH_FAILED",
    "RECONFIG_FAIL",
)


@dataclass(frozen=True)
class QueuedJob:
    """A job, or one task of an array, as Slurm tells it."""

    id: str
    """`12`, or `12_3` for the task 3 of an array."""
    raw_id: str
    """What the job calls itself: SLURM_JOB_ID."""
    state: str
    """Such as PENDING, RUNNING or COMPLETED."""
    reason: str
    """Why it waits or failed, `None` for nothing."""
    nodes: str
    """Where it runs; empty when it waits."""

    @property
    def ended(self) -> bool:
        """Whether nothing will happen any more."""
        return self.state == ENDED_WELL or self.state in ENDED_BADLY


def submit_script(script: Path, after: Sequence[str] = ()) -> str:
    """Hand a script to Slurm; returns the job's id.

    Args:
        script: the file.
        after: the ids of jobs that must end well first; else this one is cancelled.

    Raises:
        InputError: there is no Slurm here, or it refuses the job; the sentence says why.
    """
    waits = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    told = _run(["sbatch", "--parsable", *(waits if after else []), str(script)])
    return told.strip().split(";")[0]


def queued_jobs(ids: Sequence[str]) -> list[QueuedJob]:
    """The jobs of these ids that Slurm still knows; arrays give one entry per task.

    Raises:
        InputError: there is no Slurm here, or its controller does not answer.
    """
    if not ids:
        return []
    jobs = []
    for one in ids:  # a single id that is gone makes squeue forget the others
        try:
            told = _run([*_SQUEUE, f"--jobs={one}"])
        except InputError as error:
            if "Invalid job id" in str(error):
                continue
            raise
        jobs += [QueuedJob(*line.split("|")) for line in told.splitlines() if line.count("|") == 4]
    return jobs


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError as error:
        raise InputError(
            f"there is no {command[0]} on this machine; run this on a login node of the cluster, "
            "or look at the script with --dry-run"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"{command[0]} gave no answer within {_SECONDS} seconds; ask again when the cluster's "
            "controller is up"
        ) from error
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise InputError(f"{command[0]} refused ({reason}); change the cluster options")
    return done.stdout
