"""Multipliers: what they penalise, how they move, and that they find a known optimum."""

from __future__ import annotations

import math

import pytest
import torch

from rlprompt.algorithms.constraints import Multipliers

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
