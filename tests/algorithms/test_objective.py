"""Constraints and robust objectives: through a whole run, and across a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlprompt.algorithms.base import BatchView
from rlprompt.algorithms.objective import CVaRSettings, QueryWeights, WorstGroupSettings
from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.types import Query
from tests.fixtures.runs import comparable_rows, tiny_recipe, tiny_trainer

GROUPS = [
    Query(({"role": "user", "content": f"{i}"},), {"kind": k}, i) for i, k in enumerate("aab")
]


def view(rewards: list[float]) -> BatchView:
    lengths = torch.full((len(rewards),), 2)
    logprobs = -torch.tensor(rewards)[:, None].expand(-1, 2)
    return BatchView(torch.tensor(rewards), lengths, lengths > 0, 2, old_logprobs=logprobs)


def test_the_worst_queries_count_and_the_others_do_not() -> None:
    weights = QueryWeights(CVaRSettings(share=1 / 3), GROUPS, uses_rewards=True)
    assert not weights.needs_logprobs
    rows = weights.row_weights(view([0.9, 0.7, 0.1, 0.2, 0.5, 0.5]), GROUPS)
    assert rows.tolist() == pytest.approx([0, 0, 3, 3, 0, 0], abs=1e-5)


def test_without_rewards_the_loss_is_that_of_the_answers() -> None:
    weights = QueryWeights(CVaRSettings(share=1 / 3), GROUPS, uses_rewards=False)
    assert weights.needs_logprobs
    rows = weights.row_weights(view([0.9, 0.7, 0.1, 0.2, 0.5, 0.5]), GROUPS)
    assert rows.tolist() == pytest.approx([3, 3, 0, 0, 0, 0], abs=1e-5)


def test_weights_move_to_the_worst_group_and_are_restored() -> None:
    settings = WorstGroupSettings(column="kind", step_size=0.5)
    weights = QueryWeights(settings, GROUPS, uses_rewards=True)
    for _ in range(5):
        rows = weights.row_weights(view([0.9, 0.9, 0.9, 0.9, 0.1, 0.1]), GROUPS)
    assert rows[4] > 1 > rows[0]
    assert weights.metrics()["robust/weight/b"] > 0.5
    again = QueryWeights(settings, GROUPS, uses_rewards=True)
    again.load_state_dict(weights.state_dict())
    assert again.metrics() == weights.metrics()


@pytest.mark.parametrize(
    ("column", "sentence"),
    [("none", "row 0 of the dataset lacks"), ("same", "has one value in all training")],
)
def test_a_group_column_must_tell_groups_apart(column: str, sentence: str) -> None:
    rows = [Query(({"role": "user", "content": "x"},), {"same": 1}, i) for i in range(3)]
    with pytest.raises(InputError, match=f"robust.column is '{column}'.*{sentence}"):
        QueryWeights(WorstGroupSettings(column=column), rows, uses_rewards=True)


LENGTH = {
    "path": "rewards.py:letters",
    "name": "cost",
    "role": "constraint",
    "limit": -100.0,
}
CONSTRAINED: dict[str, Any] = {
    "rewards": [{"path": "rewards.py:letters", "name": "letters"}, LENGTH],
    "constraints": {"lr": 0.01},
    "training": {"steps": 4, "save_every": 1},
}


def test_a_violated_constraint_raises_its_multiplier_and_resumes(tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    tiny_trainer(tmp_path, straight, **CONSTRAINED).run()
    rows = read_jsonl(straight / "metrics.jsonl")
    multipliers = [row["constraint/cost/multiplier"] for row in rows]
    assert multipliers == sorted(multipliers) and multipliers[0] > 0
    assert rows[0]["constraint/cost/violation"] > 0

    resumed = tmp_path / "resumed"
    two = {**CONSTRAINED, "training": {"steps": 2, "save_every": 1}}
    constant = {"optimizer": {"schedule": "constant"}}
    two["training"] |= constant
    four = {**CONSTRAINED, "training": {**CONSTRAINED["training"], **constant}}
    tiny_trainer(tmp_path, resumed, **two).run()
    tiny_trainer(tmp_path, resumed, **four).run(resume=True)
    whole = tmp_path / "whole"
    tiny_trainer(tmp_path, whole, **four).run()
    assert comparable_rows(resumed, "metrics") == comparable_rows(whole, "metrics")


def test_a_robust_run_logs_what_each_group_counts_for(tmp_path: Path) -> None:
    rows = [{"query": f"the sun {i}", "kind": "ab"[i % 2]} for i in range(8)]
    changes = {
        "data": {"rows": rows, "heldout": 2},
        "robust": {"type": "worst_group", "column": "kind"},
        "augment": [{"type": "instructions", "share": 1.0}],
        "training": {"queries_per_step": 2},
    }
    output = tmp_path / "out"
    tiny_trainer(tmp_path, output, **changes).run()
    logged = read_jsonl(output / "metrics.jsonl")
    assert all({"robust/weight/a", "robust/weight/b"} <= row.keys() for row in logged)
    drawn = read_jsonl(output / "completions.jsonl")
    asked = {row["split"]: row["query"] for row in drawn}
    assert "\n\nthe sun" in asked["train"] and "\n\n" not in asked["heldout"]


def test_multiplier_settings_without_a_constraint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="constraints has no effect"):
        tiny_recipe(tmp_path, constraints={"lr": 0.5})
