"""Multipliers: what they penalise, how they move, and that they find a known optimum; then a whole
run under a constraint, and across a resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlprompt.algorithms.constraints import Multipliers
from rlprompt.files import read_jsonl
from tests.fixtures.runs import comparable_rows, tiny_recipe, tiny_trainer

NAN = math.nan


def test_a_multiplier_grows_under_violation_and_never_falls_below_zero() -> None:
    one = Multipliers({"toxic": 0.2}, lr=0.5)
    metrics = one.update({"toxic": torch.tensor([1.0, 0.0, NAN])})
    assert metrics["constraint/toxic/violation"] == pytest.approx(0.3)
    assert metrics["constraint/toxic/multiplier"] == one.values["toxic"] == pytest.approx(0.15)
    one.update({"toxic": torch.zeros(3)})
    one.update({"toxic": torch.zeros(3)})
    assert one.values == {"toxic": 0.0}
    assert one.update({"toxic": torch.full((3,), NAN)}) == {"constraint/toxic/multiplier": 0.0}


def test_penalised_rewards_are_the_lagrangian() -> None:
    two = Multipliers({"a": 0.5, "b": 0.0}, lr=1.0, initial=2.0)
    rewards = torch.tensor([1.0, 1.0, NAN])
    costs = {"a": torch.tensor([0.5, 1.0, 0.0]), "b": torch.tensor([0.0, NAN, 1.0])}
    total = two.penalised(rewards, costs)
    assert total[:2].tolist() == [1.0, 0.0] and math.isnan(float(total[2]))
    scaled = Multipliers({"a": 0.5, "b": 0.0}, lr=1.0, initial=2.0, rescale=True)
    assert scaled.penalised(rewards, costs)[:2].tolist() == pytest.approx([0.2, 0.0])


def test_a_maximum_holds() -> None:
    one = Multipliers({"a": 0.0}, lr=10.0, maximum=3.0)
    one.update({"a": torch.ones(4)})
    assert one.values == {"a": 3.0}


@pytest.mark.parametrize("rescale", [False, True])
def test_a_policy_over_two_actions_meets_its_limit(rescale: bool) -> None:
    """The better action costs 1: the best policy under a limit of 0.3 plays it with p = 0.3."""
    one = Multipliers({"cost": 0.3}, lr=0.05, rescale=rescale)
    rewards, costs = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])
    logit = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([logit], lr=0.2)
    generator = torch.Generator().manual_seed(0)
    played, multipliers = [], []
    for _ in range(4000):
        p = torch.sigmoid(logit)
        policy = torch.stack([p, 1 - p])
        total = one.penalised(rewards, {"cost": costs})
        optimizer.zero_grad()
        (-(policy * total).sum()).backward()
        optimizer.step()
        drawn = torch.bernoulli(p.detach().expand(20), generator=generator)
        one.update({"cost": drawn})
        played.append(float(p.detach()))
        multipliers.append(one.values["cost"])
    assert sum(played[-2000:]) / 2000 == pytest.approx(0.3, abs=0.02)
    if not rescale:  # the average of an orbit is its centre only where the game is bilinear
        assert sum(multipliers[-2000:]) / 2000 == pytest.approx(1.0, abs=0.05)  # shadow price


def test_its_state_restores_it() -> None:
    first, second = (Multipliers({"a": 0.0, "b": 1.0}, lr=0.3) for _ in range(2))
    first.update({"a": torch.ones(2), "b": torch.ones(2)})
    second.load_state_dict(first.state_dict())
    assert second.values == first.values
    with pytest.raises(ValueError, match=r"saved for \['a', 'b'\], there are \['c'\]"):
        Multipliers({"c": 0.0}, lr=0.1).load_state_dict(first.state_dict())


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


def test_multiplier_settings_without_a_constraint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="constraints has no effect"):
        tiny_recipe(tmp_path, constraints={"lr": 0.5})
