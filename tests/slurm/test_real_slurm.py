"""Jobs on a real Slurm of three nodes: requeued, preempted, in arrays, failing."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlprompt.files import read_jsonl
from rlprompt.slurm.jobs import read_jobs, task_statuses
from rlprompt.slurm.queue import QueuedJob, queued_jobs
from tests.cli.runs import Shown, rlprompt, write_recipe
from tests.fixtures.runs import comparable_rows

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

SLOW_REWARD = '''
import os, time

def reward(completions, trainer_state, **kwargs):
    """Vowels; as slow as SECONDS says, and failing at the step FAIL says."""
    time.sleep(float(os.environ.get("SECONDS_PER_STEP", 0)))
    if trainer_state.global_step == int(os.environ.get("FAIL", -1)):
        raise RuntimeError("the reward fell over")
    return [sum(c in "aeiou" for c in text) / 8 for text in completions]
'''


@pytest.fixture
def recipe(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve steps, each of which takes a quarter of a second in a job."""
    path = write_recipe(
        tmp_path,
        model_dir,
        training={"steps": 12, "queries_per_step": 2, "save_every": 5},
        evaluation={"every": 6, "completions_per_query": 1},
        tracking={"trackers": ["console"]},
    )
    (tmp_path / "reward.py").write_text(SLOW_REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SECONDS_PER_STEP", "0.25")
    return path


def submit(*arguments: object) -> Shown:
    shown = rlprompt("submit", *arguments)
    assert shown.code == 0, shown.err + shown.out
    return shown


def the_job(output: Path) -> QueuedJob:
    (submitted,) = read_jobs(output / "slurm")
    (job,) = queued_jobs([submitted.id])
    return job


def wait_until(done: Callable[[], bool], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.2)


def steps_done(output: Path) -> int:
    path = output / "metrics.jsonl"
    return len(read_jsonl(path)) if path.exists() else 0


def reach(output: Path, step: int) -> None:
    def done() -> bool:
        job = the_job(output)
        assert not job.ended, (output / "slurm" / f"job_{job.raw_id}.log").read_text()
        return steps_done(output) >= step

    wait_until(done)


def assert_same_run(one: Path, two: Path) -> None:
    for kind in ("metrics", "completions", "evaluation"):
        assert comparable_rows(one, kind) == comparable_rows(two, kind), kind
    first, second = (load_file(o / "artifact" / "prompt.safetensors") for o in (one, two))
    assert torch.equal(first["embeddings"], second["embeddings"])


def test_a_job_that_is_requeued_and_preempted_equals_the_uninterrupted_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_run, straight = tmp_path / "job", tmp_path / "straight"
    submit(recipe, "--output", job_run, "--partition", "main")
    reach(job_run, 2)
    job = the_job(job_run)
    # As at the time limit: the batch script alone is told.
    subprocess.run(["scancel", "--batch", "--signal=USR1", job.id], check=True, timeout=20)
    logs = job_run / "slurm" / f"job_{job.raw_id}"
    wait_until(lambda: (logs / "attempt_0" / "exit_code").exists())
    assert (logs / "attempt_0" / "exit_code").read_text().strip() == "85"
    first = steps_done(job_run)
    assert first < 12

    reach(job_run, first + 2)
    preempt = ["sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive"]
    subprocess.run(
        [*preempt, "--output=/dev/null", "--wrap=sleep 1"], check=True, timeout=20, cwd=tmp_path
    )
    wait_until(lambda: the_job(job_run).ended)
    assert the_job(job_run).state == "COMPLETED"
    assert sorted(path.name for path in logs.glob("attempt_*")) == [
        "attempt_0", "attempt_1", "attempt_2",
    ]  # fmt: skip
    assert steps_done(job_run) == 12
    monkeypatch.setenv("SECONDS_PER_STEP", "0")
    assert rlprompt("train", recipe, "--output", straight).code == 0
    assert_same_run(straight, job_run)
    shown = rlprompt("submit", "--status", "--output", job_run)
    assert shown.code == 0 and "COMPLETED" in shown.out and "12/12" in shown.out


def test_a_sweep_is_an_array_and_a_command_follows_it(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "sweep"
    shown = submit(
        recipe, "training.steps=2", "--sweep", "seed=[1, 2]", "--max-parallel", 2,
        "--then", "ls {output}/*/artifact > {output}/listed.txt", "--output", output, "--wait",
    )  # fmt: skip
    assert "000" in os.listdir(output) and "step 2/2" in shown.out
    for number, seed in enumerate((1, 2)):
        text = (output / f"{number:03d}" / "recipe.resolved.yaml").read_text()
        assert f"seed: {seed}" in text
        summary = json.loads((output / f"{number:03d}" / "summary.json").read_text())
        assert summary["stopped_because"] == "finished"
    assert (output / "listed.txt").read_text().count("prompt.safetensors") == 2


def test_a_failing_job_tells_why_and_what_follows_it_never_starts(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "1")
    output = tmp_path / "fails"
    shown = rlprompt(
        "submit", recipe, "--output", output, "--then", "touch {output}/followed", "--wait"
    )
    assert shown.code == 1, shown.out
    assert "the reward fell over" in shown.out
    assert "rank_0.log" in shown.out
    assert not (output / "followed").exists()
    jobs = read_jobs(output / "slurm")
    train, after = task_statuses(output / "slurm", jobs, queued_jobs([job.id for job in jobs]))
    assert (train.state, after.state) == ("FAILED", "CANCELLED")
    assert "the reward fell over" in train.reason
    forgotten, _ = task_statuses(output / "slurm", jobs, [])
    assert forgotten.state == "ENDED" and "the reward fell over" in forgotten.reason


def test_a_server_runs_on_a_node_of_its_own_and_the_training_knows_its_address(
    recipe: Path, tmp_path: Path
) -> None:
    output = tmp_path / "served"
    submit(
        recipe, "training.steps=1", "name=at-{server}", "--output", output, "--wait",
        "--server", "echo serving on $SLURMD_NODENAME; sleep 600",
    )  # fmt: skip
    assert "name: at-127.0.0.2" in (output / "recipe.resolved.yaml").read_text()
    (log,) = (output / "slurm").glob("job_*/attempt_0/server_0.log")
    assert log.read_text().startswith("serving on n2\n")
    environment = (log.parent / "environment.txt").read_text()
    assert "SLURM_JOB_NUM_NODES=2" in environment
