"""`training.max_seconds`: the run ends after the step that uses it up, evaluated and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlprompt.files import read_jsonl
from rlprompt.runs.checkpoint import checkpoint_steps, load_checkpoint
from rlprompt.training.optimizer import lr_factor
from rlprompt.training.settings import OptimizerSettings, TrainingSettings
from tests.fixtures.runs import tiny_recipe, tiny_trainer

LONG: dict[str, Any] = {"steps": 1000, "save_every": 500}


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_a_run_ends_after_the_step_that_uses_its_time_up(tmp_path: Path, clock: str) -> None:
    output = tmp_path / "run"
    plain = {
        "training": {**LONG, "max_seconds": 0.15, "clock": clock},
        "evaluation": {"every": 1000},
    }
    trainer = tiny_trainer(tmp_path, output, **plain)
    summary = trainer.run()
    steps, progress = summary["steps"], trainer.state.progress
    assert summary["stopped_because"] == "max_seconds"
    assert 1 <= steps < 1000 and progress.budget_seconds >= 0.15
    if clock == "wall":
        *before, last = progress.step_seconds
        assert sum(before) < 0.15
        assert progress.budget_seconds == pytest.approx(sum(before) + last, rel=0.1)
    learned = [row for row in read_jsonl(output / "evaluation.jsonl") if row["who"] == "learned"]
    assert [row["step"] for row in learned] == [0, steps]
    assert checkpoint_steps(output / "checkpoints") == [steps]
    resumed = tiny_trainer(tmp_path, output, **plain)
    assert resumed.run(resume=True)["steps"] == steps
    assert resumed.state.progress.budget_seconds == progress.budget_seconds


def test_the_time_of_resumed_parts_adds_up(tmp_path: Path) -> None:
    output = tmp_path / "run"
    tiny_trainer(tmp_path, output, training={"steps": 2}).run()
    spent = load_checkpoint(output / "checkpoints").state["progress"]["budget_seconds"]
    again = tiny_trainer(tmp_path, output, training={**LONG, "max_seconds": spent * 1.01})
    assert again.run(resume=True)["steps"] == 3


def test_the_learning_rate_follows_steps_or_time_whichever_is_further() -> None:
    linear = OptimizerSettings(schedule="linear", min_lr_ratio=0.0)
    assert lr_factor(linear, 1, 100) == pytest.approx(0.99)
    assert lr_factor(linear, 1, 100, 0.75) == pytest.approx(0.25)
    assert lr_factor(linear, 90, 100, 0.75) == pytest.approx(0.1)
    assert lr_factor(linear, 1, 100, 3.0) == 0.0
    warm = OptimizerSettings(warmup_steps=2)
    assert lr_factor(warm, 0, 100, 0.5) == 0.5


def test_members_of_a_population_share_the_time(tmp_path: Path) -> None:
    members = [{"name": "a"}, {"name": "b", "changes": {"seed": 1}}]
    recipe = tiny_recipe(tmp_path, population=members, training={"steps": 4, "max_seconds": 9.0})
    assert [each.training.max_seconds for each in recipe.members().values()] == [4.5, 4.5]


def test_a_clock_without_a_limit_is_refused() -> None:
    with pytest.raises(ValidationError, match="clock has no effect without max_seconds"):
        TrainingSettings(clock="cpu")
    with pytest.raises(ValidationError, match="greater than 0"):
        TrainingSettings(max_seconds=0)
