"""How submitted jobs fare: what was submitted, what Slurm says, and what the run folder says.

`jobs.json` in the job folder `<run>/slurm` lists what was submitted. A run's own files say how far
it is, whatever Slurm remembers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlprompt.errors import InputError
from rlprompt.files import iter_jsonl, to_json, write_atomic
from rlprompt.reading import json_text
from rlprompt.reading.files import read_bytes
from rlprompt.runs.stop_reason import StopReason
from rlprompt.slurm.queue import QueuedJob

JOBS_FILE = "jobs.json"
_STOPPED = 85
"""Exit code of a run that was asked to stop; see slurm/train.sbatch."""


@dataclass(frozen=True)
class Submitted:
    """One submission to Slurm."""

    id: str
    """The job's id; for an array, that of the whole."""
    kind: str
    """`train`, or the command that follows it."""
    outputs: Sequence[str] = ()
    """Run folders, one per task; empty for a command."""
    overrides: Sequence[Sequence[str]] = ()
    """What each task changes in the recipe."""
    steps: int | None = None
    """Steps of each run."""


@dataclass(frozen=True)
class TaskStatus:
    """One job, or one task of an array."""

    id: str
    kind: str
    state: str
    """Slurm's word, or ENDED when Slurm has forgotten the job."""
    step: int | None
    """Last finished step of the run."""
    steps: int | None
    reward: float | None
    """Mean reward of that step."""
    reason: str
    """Why it waits or failed; empty otherwise."""
    output: str
    """The run folder; empty for a command."""
    log: Path
    """Where to read on."""

    @property
    def ended(self) -> bool:
        """Whether nothing will happen any more."""
        return self.state == "ENDED" or QueuedJob("", "", self.state, "", "").ended

    @property
    def succeeded(self) -> bool:
        """Whether it ended well."""
        return self.ended and not self.reason


def write_jobs(folder: Path, jobs: Sequence[Submitted]) -> None:
    """Add submissions to the list in a job folder."""
    known = read_jobs(folder) if (folder / JOBS_FILE).exists() else []
    rows = [asdict(job) for job in [*known, *jobs]]
    write_atomic(folder / JOBS_FILE, to_json(rows, indent=1), private=True)


def read_jobs(folder: Path) -> list[Submitted]:
    """What was submitted from a job folder, oldest first.

    Raises:
        InputError: nothing was, or the list is damaged.
    """
    path = folder / JOBS_FILE
    try:
        return [Submitted(**row) for row in json_text.loads(read_bytes(path))]
    except FileNotFoundError as error:
        raise InputError(
            f"nothing was submitted from '{folder.parent}'; name the --output of `rlprompt submit`"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"'{path}' cannot be read ({error}); delete it") from error


def task_statuses(
    folder: Path, jobs: Sequence[Submitted], queue: Sequence[QueuedJob]
) -> list[TaskStatus]:
    """Join what was submitted with what Slurm says and what the runs wrote."""
    statuses = []
    for job in jobs:
        for task, output in enumerate(job.outputs or [""]):
            id_ = f"{job.id}_{task}" if len(job.outputs) > 1 else job.id
            known = next((each for each in queue if each.id == id_), None)
            statuses.append(_status(folder, job, id_, output, known))
    return statuses


def _status(
    folder: Path, job: Submitted, id_: str, output: str, known: QueuedJob | None
) -> TaskStatus:
    raw = known.raw_id if known is not None else id_
    attempt = _last_attempt(folder / f"job_{raw}")
    code = _exit_code(attempt / "exit_code", folder / f"job_{raw}.exit_code")
    last, summary = _progress(Path(output)) if output else ({}, {})
    state = known.state if known is not None else "ENDED"
    ended_for = StopReason.parse(summary.get("stopped_because"))
    finished = ended_for is not None and ended_for.is_complete
    reason = "" if known is None or known.reason == "None" else known.reason
    if state == "ENDED" or (known is not None and known.ended):
        reason = _failure(job, state, code, finished, attempt)
    return TaskStatus(
        id=id_,
        kind=job.kind,
        state=state,
        step=last.get("step"),
        steps=job.steps,
        reward=last.get("reward"),
        reason=reason,
        output=output,
        log=attempt / "rank_0.log" if output else folder / f"job_{raw}.log",
    )


def _failure(job: Submitted, state: str, code: int | None, finished: bool, attempt: Path) -> str:
    """Why an ended job is no success; empty when it is one."""
    if job.outputs and finished:
        return ""
    if not job.outputs and (code == 0 or state == "COMPLETED"):
        return ""
    told = failure_reason(attempt)
    if told:
        return told
    if code == _STOPPED:
        return f"{state}, stopped with a checkpoint; submit it again to go on"
    if code is not None:
        return f"exit code {code}"
    return state if state != "ENDED" else "it left no exit code"


def failure_reason(attempt: Path) -> str:
    """The line that says why an attempt failed: the first error of the lowest rank that has one."""
    for log in sorted(attempt.glob("rank_*.log"), key=lambda p: int(p.stem.split("_")[1])):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        if errors:
            return errors[-1].removeprefix("error: ")
    for log in sorted(attempt.glob("rank_*.log")):
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        raised = [line for line in lines if line[:1].isalpha() and "Error" in line.split(":")[0]]
        if raised:
            return raised[-1]
    return ""


def _last_attempt(job: Path) -> Path:
    attempts = sorted(job.glob("attempt_*"), key=lambda path: int(path.name.split("_")[1]))
    return attempts[-1] if attempts else job / "attempt_0"


def _exit_code(*places: Path) -> int | None:
    for path in places:
        if path.exists():
            return int(path.read_text().strip() or -1)
    return None


def _progress(output: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The last row of a run's metrics, and its summary."""
    last: Mapping[str, Any] = {}
    if (output / "metrics.jsonl").exists():
        for row in iter_jsonl(output / "metrics.jsonl"):
            last = row
    try:
        summary = json_text.loads(read_bytes(output / "summary.json"), surrogates=True)
    except (OSError, ValueError):
        summary = {}
    return last, summary
