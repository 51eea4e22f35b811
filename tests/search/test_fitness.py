"""Effects against the mixed model solved as one system, and fronts against their definition."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from rlprompt.search.fitness import crowding, effects, front_ranks

PARENTS = [(), (), (0,), (0, 1), (2,)]


def scores(seed: int, blocks: int = 6) -> tuple[list[int], list[int], list[float]]:
    draw = random.Random(seed)
    who, where, what = [], [], []
    for block in range(blocks):
        for candidate in range(len(PARENTS)):
            if draw.random() < 0.6:
                who.append(candidate)
                where.append(100 + 7 * block)
                what.append(draw.gauss(0, 1) + block)
    return who, where, what


def solved(
    who: list[int], where: list[int], what: list[float], pull: float
) -> tuple[np.ndarray, np.ndarray]:
    """Levels and effects together, as Henderson's equations: nothing is centred."""
    names = sorted(set(where))
    size = len(names) + len(PARENTS)
    matrix, right = np.zeros((size, size)), np.zeros(size)
    for candidate, block, value in zip(who, where, what, strict=True):
        row = np.zeros(size)
        row[names.index(block)] = 1.0
        row[len(names) + candidate] = 1.0
        matrix += np.outer(row, row)
        right += row * value
    for child, above in enumerate(PARENTS):
        row = np.zeros(size)
        row[len(names) + child] = 1.0
        for parent in above:
            row[len(names) + parent] -= 1.0 / len(above)
        matrix += pull * np.outer(row, row)
    return np.linalg.solve(matrix, right)[len(names) :], np.linalg.inv(matrix)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pull", [0.5, 8.0])
def test_effects_are_those_of_the_mixed_model(seed: int, pull: float) -> None:
    who, where, what = scores(seed)
    found = effects(who, where, what, PARENTS, pull)
    expected, inverse = solved(who, where, what, pull)
    assert np.allclose(found.mean, expected)
    levels = len(set(where))
    one, other = levels + 2, levels + 4
    variance = inverse[one, one] + inverse[other, other] - 2 * inverse[one, other]
    assert found.deviation(2, 4) == pytest.approx(np.sqrt(found.noise * variance))


def test_a_score_that_is_not_known_is_left_out() -> None:
    who, where, what = scores(1)
    more = effects([*who, 4], [*where, 100], [*what, float("nan")], PARENTS, 2.0)
    assert np.array_equal(more.mean, effects(who, where, what, PARENTS, 2.0).mean)
    assert np.array_equal(effects([0], [1], [float("nan")], PARENTS).mean, np.zeros(5))


def test_a_newcomer_is_like_its_parents_until_its_scores_say_more() -> None:
    parents = [(), (), (0,)]
    who, where, what = [0, 1] * 20, [i // 2 for i in range(40)], [1.0, 0.0] * 20
    unseen = effects(who, where, what, parents, 4.0).mean
    assert unseen[2] == pytest.approx(unseen[0])
    poor = effects([*who, 2, 1], [*where, 50, 50], [*what, 0.0, 0.0], parents, 4.0).mean
    assert unseen[1] < poor[2] < unseen[0]


def test_noise_makes_the_pull_stronger() -> None:
    """The same spread of children, once behind little noise and once behind much."""
    draw = random.Random(0)
    parents: list[tuple[int, ...]] = [(), *[(0,)] * 30]
    worth = [0.0] + [draw.gauss(0, 0.2) for _ in range(30)]
    shrunk = []
    for noise in (0.02, 1.0):
        who = [c for _ in range(4) for c in range(31)]
        where = [b for b in range(4) for _ in range(31)]
        what = [worth[c] + draw.gauss(0, noise) for c in who]
        found = effects(who, where, what, parents).mean
        raw = np.array([np.mean([w for c, w in zip(who, what, strict=True) if c == k])
                        for k in range(31)])  # fmt: skip
        shrunk.append(float(np.std(found) / np.std(raw)))
    assert shrunk[0] > 0.7 > 0.4 > shrunk[1]


def test_fronts_are_those_of_the_definition() -> None:
    draw = np.random.default_rng(0)
    points = draw.integers(0, 4, (30, 3)).astype(float)
    points[3, 1] = np.nan
    ranks = front_ranks(points)
    filled = np.where(np.isnan(points), -np.inf, points)
    for rank in range(ranks.max() + 1):
        left = np.flatnonzero(ranks >= rank)
        for each in left:
            beaten = any(
                (filled[o] >= filled[each]).all() and (filled[o] > filled[each]).any() for o in left
            )
            assert beaten == (ranks[each] > rank)


def test_the_ends_of_a_front_are_the_loneliest() -> None:
    points = np.array([[0.0, 4.0], [1.0, 3.0], [1.2, 2.9], [4.0, 0.0]])
    distance = crowding(points)
    assert np.isinf(distance[[0, 3]]).all()
    assert distance[2] > distance[1] > 0
    assert np.isinf(crowding(points[:2])).all()
    assert all(a >= b for a, b in pairwise(sorted(distance, reverse=True)))
