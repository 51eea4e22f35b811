"""Shapley values against the definition: the mean over all orders, written out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from rlprompt.interpret.orders import MetOnce, exact_values, sampled_values

Array = NDArray[np.float64]


def game(num_players: int, queries: int | None, seed: int = 0) -> dict[tuple[int, ...], Array]:
    """Any worth at all of every set; with queries, one of each."""
    random = np.random.default_rng(seed)
    shape = () if queries is None else (queries,)
    sets = [tuple(p for p in range(num_players) if bits >> p & 1) for bits in range(2**num_players)]
    return {each: np.asarray(random.normal(size=shape)) for each in sets}


def by_definition(worth: dict[tuple[int, ...], Array], num_players: int) -> Array:
    orders = list(permutations(range(num_players)))
    total = np.zeros((num_players, *worth[()].shape))
    for order in orders:
        for place, player in enumerate(order):
            before = tuple(sorted(order[:place]))
            after = tuple(sorted(order[: place + 1]))
            total[player] += worth[after] - worth[before]
    found: Array = total / len(orders)
    return found


@pytest.mark.parametrize("queries", [None, 3])
@pytest.mark.parametrize("players", [1, 2, 3, 5])
def test_exact_values_are_the_mean_over_all_orders(players: int, queries: int | None) -> None:
    worth = game(players, queries)
    met = MetOnce(lambda chosen: worth[tuple(chosen)])
    values = exact_values(met, players)
    assert values == pytest.approx(by_definition(worth, players), abs=1e-12)
    whole = worth[tuple(range(players))] - worth[()]
    assert values.sum(axis=0) == pytest.approx(whole, abs=1e-12)
    assert met.num_sets == 2**players


def test_sampled_values_come_near_them_and_always_add_up() -> None:
    worth = game(5, 4, seed=1)
    rows = sampled_values(
        MetOnce(lambda chosen: worth[tuple(chosen)]), 5, 0, lambda done: done < 3000
    )
    assert rows.shape == (3000, 5, 4)
    whole = worth[tuple(range(5))] - worth[()]
    assert rows.sum(axis=1) == pytest.approx(np.tile(whole, (3000, 1)), abs=1e-9)
    errors = rows.std(axis=0, ddof=1) / np.sqrt(len(rows))
    assert (np.abs(rows.mean(axis=0) - by_definition(worth, 5)) < 4.5 * errors).all()


def test_a_budget_of_sets_ends_the_orders() -> None:
    asked: list[Sequence[int]] = []

    def worth(players: Sequence[int]) -> float:
        asked.append(players)
        return float(len(players))

    met = MetOnce(worth)
    rows = sampled_values(met, 6, 0, lambda done: met.num_sets + 10 <= 30)
    assert len(asked) == met.num_sets <= 30 and len(rows) >= 2
    assert rows == pytest.approx(np.ones((len(rows), 6)))
    assert len(sampled_values(MetOnce(worth), 6, 0, lambda done: False)) == 0
