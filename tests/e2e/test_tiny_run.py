"""From a recipe file to an artifact that acts, and through a killed process, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from rlprompt.artifacts.format import load_artifact
from rlprompt.engines.native import NativeEngine
from rlprompt.evaluation.heldout import HeldoutEvaluator
from rlprompt.files import read_jsonl
from rlprompt.policy import open_policy
from rlprompt.recipe.build import build_single_run
from rlprompt.recipe.evaluators import _HELDOUT_SEED
from rlprompt.recipe.schema import load_recipe
from tests.fixtures.runs import comparable_rows, gradient_step, merged, tiny_recipe

ROOT = Path(__file__).parents[2]


def write_recipe(folder: Path, **changes: Any) -> Path:
    plain = merged(tiny_recipe(folder).plain(), changes)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return path


def test_a_reward_rises_and_the_artifact_reproduces_it(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        prompt={"num_virtual_tokens": 8, "max_norm_ratio": None},
        algorithm={"group_size": 16, "num_epochs": 2},
        sampling={"max_tokens": 2},
        training={
            "steps": 40,
            "queries_per_step": 4,
            "optimizer": {"lr": 0.1, "lr_relative": None},
        },
        evaluation={"every": 5, "completions_per_query": 16, "handwritten": "the rain and the sun"},
        rewards=[{"path": "rewards.py:low_tokens"}],
        tracking={"trackers": ["console", "jsonl"]},
    )
    recipe = load_recipe(path, ["name=e2e", "training.save_every=7"])
    output = tmp_path / "runs" / "e2e"
    shown = StringIO()
    trainer = build_single_run(recipe, tmp_path, output, Console(file=shown, width=100))
    summary = trainer.run()
    metrics = trainer.metrics
    assert metrics.base is not None and metrics.base < 0.3
    assert metrics.handwritten is not None and metrics.handwritten < 0.3
    assert metrics.learned is not None and metrics.learned > 0.6
    assert summary["base_fingerprint_before"] == summary["base_fingerprint_after"]
    assert "e2e" in shown.getvalue()
    assert (output / "report.html").stat().st_size > 10_000
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == [
        "step_000035",
        "step_000040",
    ]

    policy = open_policy(recipe.model)
    policy.prompt = load_artifact(output / "artifact", policy)
    judge = HeldoutEvaluator(
        NativeEngine(policy),
        gradient_step(trainer).parts.rewards,
        trainer.parts.data.heldout,
        recipe.sampling,
        completions_per_query=16,
        seed=recipe.seed + _HELDOUT_SEED,
        measures={},
    )
    result = judge.evaluate(policy.prompt, summary["best_step"])
    logged = [
        row["completion"]
        for row in read_jsonl(output / "completions.jsonl")
        if (row["step"], row["split"], row["who"]) == (summary["best_step"], "heldout", "learned")
    ]
    assert [c.text for c in result.batch.completions] == logged
    assert result.reward == summary["heldout_reward_after"]


PROGRAM = """
import json, sys, torch
from pathlib import Path
from tests.fixtures.runs import gradient_step, tiny_trainer
torch.set_num_threads(1)
folder, output, at, resume = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
trainer = tiny_trainer(
    folder, output,
    rewards=[{"path": "rewards.py:Stops", "options": {"at": at, "how": "SIGKILL"}}],
    training={"steps": 5, "save_every": 2},
)
trainer.run(resume=bool(resume))
"""


def run_in_its_own_process(*arguments: object) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.slow
def test_a_run_killed_in_one_process_goes_on_in_another(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run_in_its_own_process(tmp_path, straight, 99) == 0
    assert run_in_its_own_process(tmp_path, killed, 3) == -signal.SIGKILL
    assert [row["step"] for row in read_jsonl(killed / "metrics.jsonl")] == [1, 2, 3]
    assert run_in_its_own_process(tmp_path, killed, 99, "resume") == 0
    for kind in ("metrics", "completions", "evaluation"):
        assert comparable_rows(straight, kind) == comparable_rows(killed, kind), kind
    first, second = (
        load_file(output / "artifact" / "prompt.safetensors")["embeddings"]
        for output in (straight, killed)
    )
    assert torch.equal(first, second)
    rewards = [
        json.loads((output / "summary.json").read_text())["heldout_reward_after"]
        for output in (straight, killed)
    ]
    assert rewards[0] == rewards[1]
