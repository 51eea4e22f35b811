"""Why a job ends, from what `scontrol show job` says: the part of the batch script that decides."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rlprompt.slurm.readiness import answers, places
from rlprompt.slurm.script import train_script
from tests.slurm.test_script import one_job

START, NOW = "2026-11-30T10:00:00", "2026-11-30T10:05:00"


def fate(folder: Path, job: str, *, restarts: int = 0) -> str:
    script = train_script(one_job())
    functions = script[script.index("# What Slurm does") : script.index("# Puts the job back")]
    scontrol = folder / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\ncase "$*" in *partition*) echo "PartitionName=a GraceTime=60 Hidden=NO" ;; '
        f"*) {'exit 1' if not job else f'echo {job!r}'} ;; esac\n"
    )
    scontrol.chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_RESTART_COUNT": str(restarts),
        "THIS_JOB": "7",
    }
    shown = subprocess.run(
        ["bash", "-uc", f"{functions}\nfate"],
        env=environment, capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert shown.stderr == ""
    return shown.stdout.strip()


def job_line(state: str, preempted: str = "None", reason: str = "None", **more: str) -> str:
    values = {"Restarts": "0", "RunTime": "00:05:00", "TimeLimit": "1-00:00:00", **more}
    told = " ".join(f"{key}={value}" for key, value in values.items())
    return (
        f"JobId=7 JobName=x JobState={state} Reason={reason} {told} StartTime={START} "
        f"EndTime={NOW} PreemptEligibleTime={START} PreemptTime={preempted} Partition=a Power="
    )


@pytest.mark.parametrize(
    ("job", "restarts", "word"),
    [
        (job_line("RUNNING"), 0, "running"),
        (job_line("RUNNING", preempted="2026-11-30T10:04:00"), 0, "preempted"),
        (job_line("RUNNING", preempted="2026-11-30T09:00:00", Restarts="1"), 1, "running"),
        (job_line("COMPLETING"), 0, "cancelled"),
        (job_line("CANCELLED"), 0, "cancelled"),
        (job_line("COMPLETING", preempted=NOW), 0, "preempted"),
        (job_line("COMPLETING", preempted="2026-11-30T10:04:50"), 0, "preempted"),
        (job_line("PREEMPTED"), 0, "preempted"),
        (job_line("COMPLETING", reason="TimeLimit"), 0, "timeout"),
        (job_line("COMPLETING", TimeLimit="00:05:00"), 0, "timeout"),
        (job_line("COMPLETING", TimeLimit="UNLIMITED"), 0, "cancelled"),
        (job_line("COMPLETING", RunTime="1-00:00:09"), 0, "timeout"),
        (job_line("COMPLETING", Restarts="1"), 0, "restarted"),
        (job_line("PENDING", Restarts="3"), 2, "restarted"),
        ("", 0, "unknown"),
    ],
    ids=[
        "runs", "asked-for-by-another", "asked-for-in-an-earlier-attempt", "ended-by-scancel",
        "cancelled", "killed-at-once", "grace-is-over", "preempted", "time-limit", "time-is-over",
        "no-limit", "days", "put-back", "waits-again", "no-answer",
    ],
)  # fmt: skip
def test_the_word_is_what_slurm_does(tmp_path: Path, job: str, restarts: int, word: str) -> None:
    assert fate(tmp_path, job, restarts=restarts) == word


def test_scancel_within_the_grace_of_a_preemption_cancels(tmp_path: Path) -> None:
    later = "2099-01-01T00:00:00"
    line = job_line("COMPLETING", preempted=later).replace(NOW, "2099-01-01T00:00:30")
    assert fate(tmp_path, line) == "cancelled"


@pytest.mark.parametrize(
    ("words", "server", "found"),
    [
        (["url=http://n2:8000/v1", "http://n2:8000/x"], "n2", ["http://n2:8000/"]),
        (["a=n2:9000", "https://n2"], "n2", ["tcp://n2:9000", "https://n2/"]),
        (["name=at-n2", "n2", "http://n22:80", "xn2:80"], "n2", []),
        (["u=http://[::1]:8000/v1"], "[::1]", ["http://[::1]:8000/"]),
        (["http://10.0.0.1:80/", "http://10.0.0.12:80/"], "10.0.0.1", ["http://10.0.0.1:80/"]),
    ],
    ids=["once", "tcp-and-https", "only-a-name", "ipv6", "a-longer-address"],
)
def test_the_words_say_where_a_server_will_be_asked(
    words: list[str], server: str, found: list[str]
) -> None:
    assert places(words, server) == found


def test_nobody_answers_at_a_port_that_is_closed() -> None:
    assert not answers("tcp://127.0.0.1:9") and not answers("http://127.0.0.1:9/")
