"""What clusters do to jobs, on a real Slurm: the batch script under cancelling, preemption, moves.

In place of training, ranks are lines of shell that end with 85 when they are asked to stop, so
that all jobs together take half a minute: one fixture submits them all and does to each what its
test is about.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlprompt.slurm.queue import QueuedJob, queued_jobs, submit_script
from rlprompt.slurm.script import TrainJob, train_script
from rlprompt.slurm.settings import ClusterSettings

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

DONE = """mkdir -p "$OUTPUT"; echo '{"stopped_because": "finished"}' >"$OUTPUT/summary.json"; """
SAID = """echo "master=$MASTER_ADDR:$MASTER_PORT files=$(ulimit -n) threads=$OMP_NUM_THREADS" """
STOPS = 'trap "exit 85" TERM USR1; echo up; sleep 60 & wait; exit 1'
STUBBORN = 'trap "" TERM USR1; echo up; for i in $(seq 60); do sleep 1; done; exit 1'
KILLED = "echo up; kill -9 $$"
AGAIN = 'if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then ' + DONE + SAID + "; exit 0; fi; "


@dataclass
class Job:
    """One submission."""

    folder: Path
    id: str

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("job_*.log")))

    def rank(self, attempt: int) -> str:
        found = list(self.folder.glob(f"job_*/attempt_{attempt}/rank_0.log"))
        return found[0].read_text() if found else ""

    def attempts(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("job_*/attempt_*"))

    def queued(self) -> list[QueuedJob]:
        return queued_jobs([self.id])


def submit(folder: Path, *lines: str, more: dict[str, Any] | None = None, **cluster: Any) -> Job:
    """A job whose rank is a shell line; several lines make an array."""
    outputs = [folder / f"run_{number}" for number in range(len(lines))]
    words = [
        ["bash", "-c", f"OUTPUT={shlex.quote(str(out))}; {line}"]
        for out, line in zip(outputs, lines, strict=True)
    ]
    more = more or {}
    settings = ClusterSettings(
        python=sys.executable, **{"directives": ("--exclude=n3",), **cluster}
    )
    job = TrainJob(
        name=folder.name, folder=folder, commands=more.pop("commands", words), outputs=outputs,
        cluster=settings, **more,
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "train.sbatch").write_text(train_script(job))
    return Job(folder, submit_script(folder / "train.sbatch"))


def wait_until(done: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what}: it takes too long"
        time.sleep(0.2)


def is_up(job: Job) -> bool:
    assert not any(each.ended for each in job.queued()), job.log
    return "up" in job.rank(0)


def slurm(*words: str) -> None:
    subprocess.run(words, check=True, timeout=30)


def urgent(node: str) -> None:
    """Preempt what runs on a node."""
    slurm("sbatch", "--parsable", "--partition=urgent", f"--nodelist={node}", "--exclusive",
          "--output=/dev/null", "--wrap=sleep 1")  # fmt: skip


SERVES = 'sleep 2; exec python3 -m http.server --bind "$SERVER" 8123'
ASKS = (
    "python3 -c \"import urllib.request as u; print(u.urlopen('$0', timeout=5).status)\" "
    "&& echo proxy=$NO_PROXY server=$RLPROMPT_SERVER; "
)


@pytest.fixture(scope="module")
def jobs(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """All jobs, after they have ended."""
    top = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.delenv("OMP_NUM_THREADS", raising=False)
        on_n3: dict[str, Any] = {"directives": ("--nodelist=n3",), "partition": "cheap"}
        made = {
            "preempted": submit(top / "preempted", AGAIN + STOPS, **on_n3),
            "stubborn": submit(top / "stubborn", AGAIN + STUBBORN, **on_n3),
            "served": _submit_served(top / "served"),
            "cancelled": submit(top / "cancelled", AGAIN + STOPS),
            "told": submit(top / "told", AGAIN + STOPS),
            "setup": submit(
                top / "setup", AGAIN + STOPS,
                setup=('echo setting up; [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || sleep 6',),
            ),
        }  # fmt: skip
        started = [made[name] for name in ("preempted", "stubborn", "cancelled", "told", "served")]
        wait_until(lambda: all(is_up(job) for job in started), "starting")
        slurm("scancel", made["cancelled"].id)
        slurm("scancel", "--signal=TERM", made["told"].id)
        urgent("n3")
        slurm("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
        try:
            slurm("scancel", "--batch", "--signal=USR1", made["served"].id)
            wait_until(lambda: "setting up" in made["setup"].log, "setting up")
            slurm("scancel", "--batch", "--signal=USR1", made["setup"].id)
            wait_until(lambda: len(made["served"].attempts()) == 2, "moving the server", 60)
        finally:
            slurm("scontrol", "update", "nodename=n2", "state=resume")
        made |= {
            "killed": submit(top / "killed", AGAIN + KILLED, directives=("--export=NONE",)),
            "kills": submit(top / "kills", KILLED, max_kills=0),
            "percent": submit(top / "50%t of it", DONE + SAID),
            "silent": submit(top / "silent", "true"),
            "array": submit(top / "array", DONE + "sleep 3", AGAIN + STOPS),
        }
        wait_until(lambda: "up" in _rank_of_last(made["array"]), "starting the array")
        slurm("scancel", "--batch", "--signal=USR1", f"{made['array'].id}_1")
        wait_until(lambda: all(e.ended for job in made.values() for e in job.queued()), "ending")
        yield made


def _submit_served(folder: Path) -> Job:
    line = AGAIN.replace("if [", f"OUTPUT={folder / 'run_0'}; {ASKS} if [", 1) + STOPS
    words = ["bash", "-c", line, "http://{server}:8123/"]
    more = {"server": SERVES, "server_nodes": 1, "commands": [words]}
    return submit(
        folder, "", more=more, directives=(), srun_arguments=("--comment=ours",), server_wait_s=60
    )


def _rank_of_last(job: Job) -> str:
    logs = sorted(job.folder.glob("job_*/attempt_0/rank_0.log"))
    return "".join(log.read_text() for log in logs)


def state(job: Job) -> str:
    (queued,) = job.queued()
    return queued.state


def test_a_cancelled_job_does_not_come_back(jobs: dict[str, Job]) -> None:
    job = jobs["cancelled"]
    assert state(job) == "CANCELLED", job.log
    assert job.attempts() == ["attempt_0"]
    assert "it was cancelled: not put back" in job.log


def test_ranks_that_somebody_stopped_by_hand_do_not_come_back(jobs: dict[str, Job]) -> None:
    job = jobs["told"]
    assert job.attempts() == ["attempt_0"], job.log
    assert "not by Slurm: not put back" in job.log


@pytest.mark.parametrize("name", ["preempted", "stubborn"])
def test_preemption_that_cancels_puts_the_job_back(jobs: dict[str, Job], name: str) -> None:
    job = jobs[name]
    assert state(job) == "COMPLETED", job.log
    assert job.attempts() == ["attempt_0", "attempt_1"]
    assert "preempted: put back into the queue" in job.log


def test_a_stop_signal_during_setup_loses_nothing(jobs: dict[str, Job]) -> None:
    job = jobs["setup"]
    assert state(job) == "COMPLETED", job.log
    assert job.attempts() == ["attempt_0", "attempt_1"]
    assert "asked to stop (USR1): put back" in job.log
    assert not job.rank(0)


def test_a_killed_rank_is_tried_again_but_not_for_ever(jobs: dict[str, Job]) -> None:
    assert state(jobs["killed"]) == "COMPLETED", jobs["killed"].log
    assert "a rank was killed (1 of 2 times" in jobs["killed"].log
    assert state(jobs["kills"]) == "FAILED"
    assert jobs["kills"].attempts() == ["attempt_0"]


def test_ranks_know_what_they_need_where_nothing_is_exported(jobs: dict[str, Job]) -> None:
    said = dict(word.split("=") for word in jobs["killed"].rank(1).split() if "=" in word)
    address, port = said["master"].split(":")
    assert address.startswith("127.0.0.")
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert 10000 <= int(port) < low
    assert int(said["files"]) > 1024 and int(said["threads"]) >= 1


def test_a_percent_sign_in_a_path_is_a_percent_sign(jobs: dict[str, Job]) -> None:
    job = jobs["percent"]
    assert state(job) == "COMPLETED", job.log
    assert "master=" in job.rank(0)


def test_a_launch_that_left_no_run_is_no_success(jobs: dict[str, Job]) -> None:
    job = jobs["silent"]
    assert state(job) == "FAILED"
    assert "has not come to its end" in job.log


def test_the_last_task_of_an_array_comes_back_alone(jobs: dict[str, Job]) -> None:
    job = jobs["array"]
    assert {each.state for each in job.queued()} == {"COMPLETED"}, job.log
    attempts = sorted(len(list(path.glob("attempt_*"))) for path in job.folder.glob("job_*/"))
    assert attempts == [1, 2]


def test_a_server_is_waited_for_and_may_move_with_its_job(jobs: dict[str, Job]) -> None:
    job = jobs["served"]
    assert state(job) == "COMPLETED", job.log
    assert job.log.count("the server answers") == 2
    first, second = job.rank(0).split(), job.rank(1).split()
    assert first[0] == second[0] == "200"
    assert "server=127.0.0.2" in first and "server=127.0.0.3" in second
    assert any(word.startswith("proxy=") and "127.0.0.3" in word for word in second)
    script = (job.folder / "train.sbatch").read_text()
    assert script.count("--comment=ours") == 2
