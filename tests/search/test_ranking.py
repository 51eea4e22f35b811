"""What rewards say of a generation: against statements written out and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlprompt.search.ranking import candidate_scores, places, reliability, utilities

NAN, INF = math.nan, math.inf


def test_known_rewards_are_averaged() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.5, 0.75]])
    assert candidate_scores(rewards).tolist() == [0.5, 0.625]
    assert candidate_scores(rewards).dtype == torch.float64


def test_whoever_misses_the_hard_query_is_not_better_for_it() -> None:
    """Both are equal where both are known; the second query is hard for everybody."""
    scores = candidate_scores(torch.tensor([[0.9, 0.1], [0.9, NAN], [0.8, 0.0], [NAN, NAN]]))
    assert scores[0] == pytest.approx(float(scores[1]), abs=0.06)
    assert scores[0] > scores[2] and scores[1] > scores[2] and scores[3].isnan()


def test_equal_scores_share_places_and_the_unknown_stands_in_the_middle() -> None:
    assert places(torch.tensor([3.0, 1.0, 2.0])).tolist() == [0, 2, 1]
    assert places(torch.tensor([1.0, 2.0, 1.0, 0.0])).tolist() == [1.5, 0, 1.5, 3]
    assert places(torch.tensor([5.0, NAN, 1.0])).tolist() == [0, 1, 2]
    assert places(torch.tensor([NAN, 4.0, 3.0, 2.0, 1.0])).tolist() == [2, 0, 1, 3, 4]
    assert places(torch.full((4,), NAN)).tolist() == [1.5] * 4
    assert places(torch.tensor([-INF, INF, 0.0])).tolist() == [2, 0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_places_are_those_of_any_increasing_transform(seed: int) -> None:
    scores = torch.from_numpy(np.random.default_rng(seed).standard_normal(9))
    scores[3] = scores[5]
    for transform in (torch.exp, torch.atan, lambda x: x**3, lambda x: 1e6 * x - 7):
        assert torch.equal(places(transform(scores)), places(scores))
    assert float(places(scores).sum()) == 9 * 8 / 2


def test_utilities_are_those_of_the_paper() -> None:
    """Written out for 5 candidates: the upper part of the logarithm, scaled, less a fifth."""
    raw = [max(0.0, math.log(3.5) - math.log(k)) for k in range(1, 6)]
    expected = [value / sum(raw) - 0.2 for value in raw]
    found = utilities(torch.tensor([2.0, 0.0, 1.0, 4.0, 3.0]))
    assert found.tolist() == pytest.approx([expected[k] for k in (2, 0, 1, 4, 3)])
    assert float(found.sum()) == pytest.approx(0.0, abs=1e-12)


def test_equal_candidates_have_equal_utilities() -> None:
    found = utilities(places(torch.tensor([2.0, 5.0, 2.0, 2.0, 1.0, 9.0])))
    assert found[0] == found[2] == found[3]
    assert float(found.sum()) == pytest.approx(0.0, abs=1e-12)
    assert utilities(places(torch.ones(6))).tolist() == [0.0] * 6


@pytest.mark.parametrize(("signal", "noise"), [(1.0, 1.0), (1.0, 3.0), (0.2, 1.0), (1.0, 0.01)])
def test_reliability_is_the_correlation_with_other_queries(signal: float, noise: float) -> None:
    """Of many tables drawn from a model whose parts are known; what queries share is no noise."""
    draw = np.random.default_rng(0)
    candidates, queries = 200, 8
    worth = signal * draw.standard_normal((candidates, 1))
    hard = 50.0 * draw.standard_normal((1, queries))
    rewards = worth + hard + noise * draw.standard_normal((candidates, queries))
    expected = signal**2 / (signal**2 + noise**2 / queries)
    assert reliability(torch.from_numpy(rewards)) == pytest.approx(expected, abs=0.1)


def test_reliability_without_a_table_is_unknown() -> None:
    assert math.isnan(reliability(torch.tensor([[1.0], [2.0]])))
    assert math.isnan(reliability(torch.tensor([[1.0, 2.0]])))
    assert math.isnan(reliability(torch.tensor([[1.0, NAN], [NAN, 2.0]])))
    assert math.isnan(reliability(torch.zeros(3, 0)))
    assert reliability(torch.tensor([[1.0, 1.0], [1.0, 1.0]])) == 0.0
    assert reliability(torch.tensor([[1.0, 2.0], [2.0, 3.0]])) == 1.0
    whole = torch.tensor([[1.0, 2.0, 4.0], [2.0, 3.0, 1.0]])
    wider = torch.tensor([[1.0, NAN, 2.0, 4.0], [2.0, 7.0, 3.0, 1.0], [NAN] * 4])
    assert reliability(wider) == reliability(whole)
