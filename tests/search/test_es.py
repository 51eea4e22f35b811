"""The natural evolution strategy finds known optima, by ranks alone, and goes on where it was."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from rlprompt.runs.learner import LearnerState
from rlprompt.search.es import ESSettings, ExponentialNES
from rlprompt.search.ranking import places
from tests.fixtures.toys import evaluations_to_reach, toy


@pytest.mark.parametrize(
    ("name", "dim", "limit"),
    [("sphere", 4, 900), ("ellipsoid", 4, 1400), ("rotated", 4, 1400), ("rosenbrock", 4, 2600)],
)
def test_known_optima_are_reached_in_all_seeds(name: str, dim: int, limit: int) -> None:
    for seed in range(10):
        strategy = ExponentialNES(ESSettings(dim=dim, sigma=1.0), seed)
        assert evaluations_to_reach(strategy, toy(name, dim, seed), 1e-6, limit), seed


def test_under_noise_the_optimum_is_approached_in_all_seeds() -> None:
    for seed in range(10):
        strategy = ExponentialNES(ESSettings(dim=4, sigma=1.0, population=20), seed)
        assert evaluations_to_reach(strategy, toy("sphere", 4, seed), 0.1, 1200, noise=1.0), seed


def test_it_takes_the_same_path_under_a_monotone_transform() -> None:
    function = toy("rotated", 5, 1)
    one, other = (ExponentialNES(ESSettings(dim=5), 3) for _ in range(2))
    for generation in range(40):
        values = torch.tensor([function(p.numpy()) for p in one.sample(generation)])
        assert torch.equal(one.sample(generation), other.sample(generation))
        one.update(places(-values))
        other.update(places(-(values.log() * 1e3 + 5)))
    assert torch.equal(one.mean, other.mean)


def test_the_rates_of_size_and_shape_can_be_zero() -> None:
    strategy = ExponentialNES(ESSettings(dim=4, sigma=0.3, size_rate=0.0, shape_rate=0.0), 0)
    for generation in range(5):
        points = strategy.sample(generation)
        strategy.update(places(-points.square().sum(1) + points[:, 0]))
    assert strategy.deviation == pytest.approx(0.3)
    assert bool(strategy.mean.any())


def test_generations_are_of_pairs() -> None:
    assert ExponentialNES(ESSettings(dim=8), 0).population == 10
    assert ExponentialNES(ESSettings(dim=12), 0).population == 12  # 11 rounded up
    with pytest.raises(ValidationError, match="7 candidates are no antithetic pairs; choose 8"):
        ESSettings(population=7)
    strategy = ExponentialNES(ESSettings(dim=3), 0)
    points = strategy.sample(0)
    assert torch.allclose(points[0::2] + points[1::2], 2 * strategy.mean)


def test_a_state_is_taken_up_or_refused() -> None:
    strategy = ExponentialNES(ESSettings(dim=4), 1)
    for generation in range(4):
        points = strategy.sample(generation)
        strategy.update(places(-points.square().sum(1)))
    state = strategy.state()
    again = ExponentialNES(ESSettings(dim=4), 1)
    again.restore(LearnerState(state.tensors, json.loads(json.dumps(state.plain))))
    assert torch.equal(again.sample(4), strategy.sample(4))
    with pytest.raises(ValueError, match="another dimension"):
        ExponentialNES(ESSettings(dim=5), 1).restore(state)
    with pytest.raises(ValueError, match="another strategy"):
        again.restore(LearnerState({}, {"cma": "4.5.0"}))
