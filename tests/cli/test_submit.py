"""`rlprompt submit` where there is no Slurm; tests/slurm has the real one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.cli.runs import rlprompt, write_recipe


def test_dry_run_prints_the_scripts_and_leaves_nothing(model_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model_dir)
    shown = rlprompt(
        "submit", recipe, "seed=3", "--output", tmp_path / "run", "--nodes", 2, "--then",
        "rlprompt eval {artifact}", "--dry-run",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert shown.out.count("#!/bin/bash") == 2
    assert "#SBATCH --nodes=2" in shown.out
    frozen = next(w for w in shown.out.split() if w.endswith("/recipe.frozen.yaml"))
    assert Path(frozen).parent.parent == tmp_path / "run" / "slurm"
    assert f"train {frozen} seed=3 --output {tmp_path / 'run'} --auto-resume" in shown.out
    assert f"'rlprompt eval {tmp_path / 'run' / 'artifact'}'" in shown.out
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_the_grid_of_its_values(model_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model_dir)
    shown = rlprompt(
        "submit", recipe, "--sweep", "seed=[1, 2]", "--sweep", "name=['x: y', '1']",
        "--output", tmp_path / "grid", "--dry-run",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert "#SBATCH --array=0-3\n" in shown.out
    last = f"seed=2 'name='\"'\"'1'\"'\"'' --output {tmp_path / 'grid' / '003'}"
    assert last in shown.out.split("\n3) OUTPUT=")[1]


def test_without_slurm_the_sentence_says_what_to_do(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    recipe = write_recipe(tmp_path, model_dir)
    shown = rlprompt("submit", recipe, "--output", tmp_path / "run")
    assert shown.code == 2
    assert "there is no sbatch on this machine" in shown.err and "--dry-run" in shown.err


def test_what_may_hold_a_secret_is_for_its_owner_and_told(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 17\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}")
    recipe = write_recipe(tmp_path, model_dir)
    shown = rlprompt(
        "submit", recipe, "--output", tmp_path / "run", "--server", "vllm --api-key hunter2",
        "--then", "true --token hunter3",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    for name in ("train.sbatch", "then_1.sbatch", "jobs.json"):
        path = tmp_path / "run" / "slurm" / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, name
    assert "the value of --api-key in --server looks like a secret" in shown.out
    assert "the value of --token in --then looks like a secret" in shown.out
    assert "hunter2" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--tasks-per-node", 5), "is 2 with 2 completions each and there are 5 ranks"),
        (("--gpus-per-node", 1), "gpus_per_node is 1, but model.device of the recipe is cpu"),
        (("--nodes", 2, "training.overlap_rollouts=true"), "works on one rank"),
    ],
    ids=["fewer-queries-than-ranks", "gpus-for-a-cpu", "overlap"],
)
def test_what_a_job_would_refuse_is_refused_before_it_waits(
    arguments: tuple[object, ...], told: str, model_dir: Path, tmp_path: Path
) -> None:
    shown = rlprompt("submit", write_recipe(tmp_path, model_dir), *arguments, "--dry-run")
    assert shown.code == 2 and told in shown.err


def test_what_follows_a_sweep_runs_for_each_artifact(model_dir: Path, tmp_path: Path) -> None:
    shown = rlprompt(
        "submit", write_recipe(tmp_path, model_dir), "--sweep", "seed=[1, 2]", "--output",
        tmp_path / "grid", "--then", "e {artifact} -r {recipe} -o {output}/e", "--then",
        "ls {output}", "--dry-run",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    for number in ("000", "001"):
        run = tmp_path / "grid" / number
        assert f"e {run}/artifact -r " in shown.out and f"-o {run}/e" in shown.out
    assert f"'ls {tmp_path / 'grid'}'" in shown.out
