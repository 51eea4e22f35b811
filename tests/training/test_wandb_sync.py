"""A run that was tracked offline, and `wandb sync` of its folder against a server that keeps it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlprompt.training.files import read_jsonl
from tests.cli.runs import write_recipe
from tests.fixtures.tiny import save_tiny
from tests.fixtures.wandb_server import Received, wandb_server

pytestmark = pytest.mark.slow
KEYS = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE")


def run(folder: Path, *command: object, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in KEYS}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env={**kept, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def sync(folder: Path, received: Received) -> None:
    runs = sorted(folder.glob("run/wandb/offline-run-*"))
    access = {"WANDB_BASE_URL": received.url, "WANDB_API_KEY": "a" * 40}
    run(folder, "wandb", "sync", "--yes", *runs, **access)


def test_an_offline_run_of_two_attempts_is_synced_as_one(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    recipe = write_recipe(
        tmp_path,
        save_tiny(tmp_path / "model"),
        tracking={"trackers": ["wandb"], "project": "p", "tags": ["t"], "tables_every": 1},
    )
    stops = "import os, signal\nown = reward\n\ndef reward(completions, trainer_state, **kwargs):\n"
    stops += (
        "    if trainer_state.global_step == 1:\n        os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    plain = (tmp_path / "reward.py").read_text()
    (tmp_path / "reward.py").write_text(plain + stops + "    return own(completions)\n")
    train = ("rlprompt", "train", recipe, "-o", tmp_path / "run")
    assert "stopped by SIGUSR1" in run(tmp_path, *train)
    (tmp_path / "reward.py").write_text(plain)
    run(tmp_path, *train, "--resume")
    with wandb_server() as received:
        sync(tmp_path, received)

    assert {each["name"] for each in received.runs} == {(tmp_path / "run/wandb_id").read_text()}
    assert received.runs[0]["tags"] == ["t"]
    logged = {row["step"]: row["reward"] for row in received.history if "reward" in row}
    assert logged == {
        row["step"]: row["reward"] for row in read_jsonl(tmp_path / "run/metrics.jsonl")
    }
    tables = [name for name in received.files if name.startswith("media/table/completions/train")]
    rows = [row for name in tables for row in json.loads(received.files[name])["data"]]
    assert len(rows) >= 3 * 2 * 2  # steps, queries, completions of each
    kinds = {each["artifactTypeName"] for each in received.artifacts}
    assert {"soft_prompt", "model", "dataset"} <= kinds
    assert any("prompt/norms/embeddings" in row for row in received.history)
    assert list(tmp_path.glob("run/wandb/offline-run-*/*.synced"))
    assert received.used, [each["artifactCollectionName"] for each in received.artifacts]
