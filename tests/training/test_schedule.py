"""The schedule counts the updates that there are, so that it ends where the run ends."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from rlprompt.algorithms.value_head import ValueHeadSettings
from rlprompt.files import read_jsonl
from tests.fixtures.runs import gradient_step, tiny_trainer

STEPS = 4
LINEAR = {"lr": 0.01, "schedule": "linear", "min_lr_ratio": 0.0}


def ppo(epochs: int, minibatches: int) -> dict[str, Any]:
    return {"type": "ppo", "num_epochs": epochs, "num_minibatches": minibatches}


def plain(epochs: int, minibatches: int, queries: int, **optimizer: Any) -> dict[str, Any]:
    return {
        "algorithm": ppo(epochs, minibatches),
        "training": {
            "steps": STEPS,
            "queries_per_step": queries,
            "optimizer": {**LINEAR, **optimizer},
        },
        "evaluation": {"every": 100},
    }


@pytest.mark.parametrize(
    ("epochs", "minibatches", "queries", "of_a_step"),
    [(1, 1, 2, 1), (1, 2, 2, 2), (2, 2, 3, 4), (1, 8, 2, 2), (3, 8, 1, 3)],
)
def test_the_last_update_is_the_end_of_the_schedule(
    tmp_path: Path, epochs: int, minibatches: int, queries: int, of_a_step: int
) -> None:
    run = tiny_trainer(tmp_path, tmp_path / "run", **plain(epochs, minibatches, queries))
    run.run()
    learner = gradient_step(run)
    assert learner.updater.updates_on(queries) == of_a_step
    total = STEPS * of_a_step
    assert learner.state().plain["updates"] == total
    rates = [group["lr"] / group["peak_lr"] for group in learner.optimizer.param_groups]
    assert rates == pytest.approx([1 / total] * 2)  # prompt and value head
    logged = [row["learning_rate"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    course = [0.01 * (1 - update / total) for update in range(total)]
    shares = [course[step * of_a_step : (step + 1) * of_a_step] for step in range(STEPS)]
    for value, share in zip(logged, shares, strict=True):
        assert min(share) - 1e-12 <= value <= max(share) + 1e-12


def test_a_warm_up_and_a_resumed_run_follow_the_same_course(tmp_path: Path) -> None:
    settings = plain(1, 8, 2, warmup_steps=4)
    whole = tiny_trainer(tmp_path, tmp_path / "whole", **settings)
    whole.run()
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert rows[-1]["learning_rate"] < 0.01 * 0.51  # updates 2 and 3 of the 4 behind the warm-up
    first = tiny_trainer(tmp_path, tmp_path / "part", **settings)
    before = gradient_step(first)
    before._updates = 5
    after = tiny_trainer(tmp_path, tmp_path / "again", **settings)
    gradient_step(after).restore(before.state())
    assert gradient_step(after)._next_lr(0.0) == before._next_lr(0.0) == pytest.approx(0.0075)


def test_more_minibatches_than_queries_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_trainer(tmp_path, tmp_path / "run", **plain(1, 2, 2))
    assert not [r for r in caplog.records if "num_minibatches" in r.getMessage()]
    tiny_trainer(tmp_path, tmp_path / "more", **plain(1, 8, 2))
    (record,) = [r for r in caplog.records if "num_minibatches" in r.getMessage()]
    assert record.levelno == logging.WARNING
    assert "num_minibatches is 8 and training.queries_per_step is 2" in record.getMessage()


def test_the_value_heads_rate_is_described_as_it_is() -> None:
    described = ValueHeadSettings.model_fields["lr"].description or ""
    assert "constant" not in described and "schedule" in described
