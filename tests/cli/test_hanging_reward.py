"""A reward that hangs in the run's own process: the process ends in time, with the right code.

Each case is the real command line in a process of its own, because it is the end of the process
that goes wrong: a thread that comes back from C++ to an interpreter that is gone aborts it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.runs import REWARD, write_recipe

ROOT = Path(__file__).parents[2]
HANGING = (
    REWARD
    + """
import asyncio, time, torch


def hang_in_torch(trainer_state, **kwargs):
    weight = torch.randn(64, 64)
    while trainer_state.global_step == 1:
        weight @ weight
    return [0.0] * len(kwargs["completions"])


def hang_in_sleep(trainer_state, **kwargs):
    time.sleep(600 * trainer_state.global_step)
    return [0.0] * len(kwargs["completions"])


async def hang_in_thread(trainer_state, **kwargs):
    await asyncio.to_thread(time.sleep, 600 * trainer_state.global_step)
    return [0.0] * len(kwargs["completions"])


async def hang_in_loop(trainer_state, **kwargs):
    return hang_in_torch(trainer_state, **kwargs)
"""
)
TIMEOUT = "error: reward 'faulty' took longer than its timeout of 1 s for 4 completions"


@dataclass(frozen=True)
class Case:
    """A way to hang, and how the command must end."""

    reward: str
    code: int
    last_line: str
    on_error: str = "raise"
    isolated: bool = False

    def settings(self) -> dict[str, Any]:
        """The reward in a recipe."""
        reward = {"path": f"reward.py:{self.reward}", "name": "faulty", "timeout": 1.0}
        return reward | {"on_error": self.on_error} | ({"isolation": {}} if self.isolated else {})


CASES = [
    Case("hang_in_torch", 2, TIMEOUT),
    Case("hang_in_sleep", 2, TIMEOUT),
    Case("hang_in_thread", 2, TIMEOUT),
    Case("hang_in_loop", 2, "error: async reward 'faulty' did not stop at its timeout"),
    Case("hang_in_torch", 0, "", on_error="skip"),
    Case("hang_in_torch", 2, "error: reward 'faulty' took longer", isolated=True),
]


def start(case: Case, folder: Path, model: Path) -> subprocess.Popen[str]:
    rewards = [case.settings(), {"path": "reward.py:reward", "name": "vowels"}]
    write_recipe(folder, model, rewards=rewards, evaluation__every=100, training__steps=2)
    (folder / "reward.py").write_text(HANGING)
    return subprocess.Popen(
        [sys.executable, "-m", "rlprompt", "train", "recipe.yaml", "-o", "run"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.reward}-{c.on_error}-{c.isolated}")
def test_a_reward_that_hangs_never_changes_how_the_process_ends(
    case: Case, model_dir: Path, tmp_path: Path
) -> None:
    process = start(case, tmp_path, model_dir)
    began = time.monotonic()
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == case.code, (time.monotonic() - began, out, err)
    lines = err.splitlines()
    assert len(lines) == (1 if case.code else 0), err
    if case.code:
        assert lines[0].startswith(case.last_line)
    else:
        assert "on_error: skip" in out and (tmp_path / "run" / "summary.json").is_file()
