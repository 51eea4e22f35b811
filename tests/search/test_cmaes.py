"""CMA-ES: the package's own run, known optima, and nothing beside the numbers."""

from __future__ import annotations

import builtins
import json
import random
from pathlib import Path
from typing import Any

import cma
import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from rlprompt.errors import InputError
from rlprompt.runs.learner import LearnerState
from rlprompt.search.base import SearchStart
from rlprompt.search.cmaes import CMAESSettings, CovarianceMatrixAdaptation
from rlprompt.search.make import make_searcher
from rlprompt.search.ranking import places
from tests.fixtures.prompts import make
from tests.fixtures.runs import tiny_policy
from tests.fixtures.toys import evaluations_to_reach, toy


@pytest.mark.parametrize(("dim", "population"), [(5, None), (6, 9)])
def test_it_is_the_package_driven_by_hand(dim: int, population: int | None) -> None:
    """Bit for bit: points, mean and step size, over 150 generations of one living object."""
    function = toy("rosenbrock", dim, 0)
    draws = [np.random.default_rng([3, 0])]
    options: dict[str, Any] = {
        "randn": lambda *shape: draws[0].standard_normal(shape),
        "seed": np.nan,
        "verbose": -9,
        "verb_log": 0,
    }
    options |= {} if population is None else {"popsize": population}
    theirs = cma.CMAEvolutionStrategy([0.0] * dim, 0.7, options)
    ours = CovarianceMatrixAdaptation(dim, 0.7, population, 3)
    assert ours.population == theirs.popsize
    for generation in range(150):
        draws[0] = np.random.default_rng([3, generation])
        asked = theirs.ask()
        assert np.array_equal(ours.sample(generation).numpy(), np.stack(asked))
        values = [function(point) for point in asked]
        theirs.tell(asked, values)
        ours.update(places(-torch.tensor(values, dtype=torch.float64)))
        assert np.array_equal(ours.mean.numpy(), theirs.mean)
        spread = float(np.sqrt(np.mean(theirs.sigma**2 * np.diag(theirs.C))))
        assert ours.deviation == pytest.approx(spread)
    assert function(ours.mean.numpy()) < 0.3 * function(np.zeros(dim))


@pytest.mark.parametrize(
    ("name", "dim", "limit"),
    [("sphere", 4, 600), ("ellipsoid", 4, 900), ("rotated", 4, 900), ("rosenbrock", 4, 2200)],
)
def test_known_optima_are_reached_in_all_seeds(name: str, dim: int, limit: int) -> None:
    for seed in range(10):
        strategy = CovarianceMatrixAdaptation(dim, 1.0, None, seed)
        assert evaluations_to_reach(strategy, toy(name, dim, seed), 1e-6, limit), seed


def test_under_noise_the_optimum_is_approached_in_all_seeds() -> None:
    """To 0.1, where the noise of a value is 1: single values say nothing there."""
    for seed in range(10):
        strategy = CovarianceMatrixAdaptation(4, 1.0, 20, seed)
        assert evaluations_to_reach(strategy, toy("sphere", 4, seed), 0.1, 1200, noise=1.0), seed


def test_points_of_a_generation_are_the_same_again_after_files() -> None:
    strategy = CovarianceMatrixAdaptation(4, 0.5, None, 1)
    function = toy("rotated", 4, 2)
    for generation in range(30):
        state = strategy.state()
        kept = LearnerState(load(save(dict(state.tensors))), json.loads(json.dumps(state.plain)))
        points = strategy.sample(generation)
        assert torch.equal(points, strategy.sample(generation))
        again = CovarianceMatrixAdaptation(4, 0.5, None, 1)
        again.restore(kept)
        assert torch.equal(points, again.sample(generation))
        found = places(-torch.tensor([function(point.numpy()) for point in points]))
        strategy.update(found)
        again.update(found)
        assert torch.equal(strategy.mean, again.mean)
        assert again.state().plain == strategy.state().plain


def test_a_state_of_another_strategy_is_refused() -> None:
    strategy = CovarianceMatrixAdaptation(4, 0.5, None, 1)
    state = strategy.state()
    with pytest.raises(ValueError, match=r"made with cma 4\.0\.0 .*install cma==4\.0\.0"):
        strategy.restore(LearnerState(state.tensors, {**state.plain, "cma": "4.0.0"}))
    with pytest.raises(ValueError, match="another dimension"):
        CovarianceMatrixAdaptation(5, 0.5, None, 1).restore(state)
    with pytest.raises(ValueError, match="another strategy"):
        strategy.restore(LearnerState({}, {"size": 1.0}))


def test_it_leaves_global_generators_and_the_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards may draw from NumPy's own generator; the package seeds it where it is not told."""
    monkeypatch.chdir(tmp_path)
    np.random.seed(5)
    random.seed(5)
    expected = str(np.random.get_state()), random.getstate()
    strategy = CovarianceMatrixAdaptation(4, 0.5, None, 1)
    for generation in range(3):
        strategy.update(torch.arange(len(strategy.sample(generation))))
    assert (str(np.random.get_state()), random.getstate()) == expected
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imported = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "cma":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    start = SearchStart(make("soft", tiny_policy()), 0)
    with pytest.raises(InputError, match=r"cmaes needs the cma package.*pip install 'rlprompt\[s"):
        make_searcher(CMAESSettings(dim=3), start)
