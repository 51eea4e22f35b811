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
