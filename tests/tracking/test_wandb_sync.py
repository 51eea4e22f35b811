"""What a server of W&B gets from a run of two attempts: online, and by `wandb sync` later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlprompt.files import read_jsonl
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


def stopped_recipe(folder: Path) -> tuple[Path, str]:
    """A recipe whose reward stops the first attempt after a step, and the reward's plain text."""
    recipe = write_recipe(
        folder,
        save_tiny(folder / "model"),
        tracking={"trackers": ["wandb"], "project": "p", "tags": ["t"], "tables_every": 1},
    )
    stops = "import os, signal\nown = reward\n\ndef reward(completions, trainer_state, **kwargs):\n"
    stops += (
        "    if trainer_state.global_step == 1:\n        os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    plain = (folder / "reward.py").read_text()
    (folder / "reward.py").write_text(plain + stops + "    return own(completions)\n")
    return recipe, plain


def two_attempts(folder: Path, **environment: str) -> None:
    """A run that is stopped by a signal, and goes on."""
    recipe, plain = stopped_recipe(folder)
    train = ("rlprompt", "train", recipe, "-o", folder / "run")
    assert "stopped by SIGUSR1" in run(folder, *train, **environment)
    (folder / "reward.py").write_text(plain)
    run(folder, *train, "--resume", **environment)


def check_history(folder: Path, received: Received) -> None:
    """One run, with every step once and the completions of each."""
    assert {each["name"] for each in received.runs} == {(folder / "run/wandb_id").read_text()}
    logged = [(row["step"], row["reward"]) for row in received.history if "reward" in row]
    kept = [(row["step"], row["reward"]) for row in read_jsonl(folder / "run/metrics.jsonl")]
    assert logged == kept
    tables = [name for name in received.files if name.startswith("media/table/completions/train")]
    rows = [row for name in tables for row in json.loads(received.files[name])["data"]]
    assert len(rows) >= 3 * 2 * 2  # steps, queries, completions of each
    assert any("prompt/norms/embeddings" in row for row in received.history)


def test_an_offline_run_of_two_attempts_is_synced_as_one(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    two_attempts(tmp_path)
    with wandb_server() as received:
        sync(tmp_path, received)
    check_history(tmp_path, received)
    assert received.runs[0]["tags"] == ["t"]
    kinds = {each["artifactTypeName"] for each in received.artifacts}
    assert {"soft_prompt", "model", "dataset"} <= kinds
    assert list(tmp_path.glob("run/wandb/offline-run-*/*.synced"))
    assert received.used, [each["artifactCollectionName"] for each in received.artifacts]


def test_an_online_run_goes_on_as_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    with wandb_server() as received:
        two_attempts(tmp_path, WANDB_BASE_URL=received.url, WANDB_API_KEY="a" * 40)
    check_history(tmp_path, received)
    assert received.resumed == [(tmp_path / "run/wandb_id").read_text()]
    assert not list(tmp_path.glob("run/wandb/offline-run-*"))
