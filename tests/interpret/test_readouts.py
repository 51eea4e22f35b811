"""Lines on states that were made up, where it is known what can be read."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from rlprompt.interpret.readouts import foretold, readouts, told_apart
from tests.fixtures.prompts import make
from tests.interpret.subjects import QUESTIONS, SAMPLING, queries, subject, tiny_policy

Array = NDArray[np.float64]
COUNT, LAYERS, WIDTH = 24, 3, 64


def noise(seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=(COUNT, LAYERS, WIDTH))


def test_a_shift_in_one_layer_is_told_there() -> None:
    one, other = noise(0), noise(1)
    one[:, 1, 0] += 8.0
    found = told_apart(one, other, 0)
    assert found.scores[1] > 0.9 and found.scores[1] == found.scores.max()
    assert found.p_value <= 0.01 and found.control < 0.75


def test_nothing_is_told_of_equal_or_random_states() -> None:
    same = noise(0)
    found = told_apart(same, same.copy(), 0)
    assert found.scores == pytest.approx(0.5) and found.p_value > 0.05
    p_values = [told_apart(noise(2 * s), noise(2 * s + 1), s, 49).p_value for s in range(20)]
    assert sum(p <= 0.1 for p in p_values) <= 6  # 2 expected
    assert np.mean(p_values) > 0.3


def test_a_feature_that_is_in_the_states_is_foretold_and_another_is_not() -> None:
    states, random = noise(3), np.random.default_rng(9)
    feature = random.normal(size=COUNT)
    states[:, 2, 5] += 10.0 * feature
    found = foretold(states, feature, 0)
    assert found.scores[2] > 0.8 and found.p_value <= 0.01
    p_values = [foretold(noise(s), feature, s, 49).p_value for s in range(10, 30)]
    assert sum(p <= 0.1 for p in p_values) <= 6
    assert np.mean(p_values) > 0.3


def test_predictions_are_of_queries_that_were_not_fitted() -> None:
    """More dimensions than samples fit anything: what was fitted would be told perfectly."""
    wide = [np.random.default_rng(s).normal(size=(COUNT, 1, 500)) for s in (0, 1)]
    assert told_apart(wide[0], wide[1], 0, 9).scores[0] < 0.8


def test_a_prompt_is_read_beside_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    prompt = make("soft", policy, noise=1.0)
    few = subject(policy, prompt)
    assert readouts(few, None) is None  # six queries
    monkeypatch.setattr("rlprompt.interpret.readouts.FEWEST", 6)
    found = readouts(few, "the rain")
    assert found is not None and found["num_queries"] == 6 == len(few.sides.test)
    assert list(found["apart"]) == ["best sentence", "no prompt"]
    layers = policy.base.num_layers
    for row in [*found["apart"].values(), *found["foretold"].values()]:
        assert len(row["by_layer"]) == layers and 0 < row["p_value"] <= 1
    assert len(queries()) == len(QUESTIONS) and SAMPLING.max_tokens == 6
