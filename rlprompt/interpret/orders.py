"""Shapley values of games whose worth is a number, or a number for each query.

A Shapley value (Shapley, 1953) is a player's mean marginal worth over all orders of the players.
Few players are looked at in every set, which gives it exactly; of more, orders are drawn together
with their reverse (antithetic). Either way all values add up to the worth of everybody minus that
of nobody.

Letters: S players, K pairs of orders, Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Worth = Callable[[Sequence[int]], float | NDArray[np.float64]]
"""The worth of a set of players, given in ascending order; a number, or [Q] numbers."""


class MetOnce:
    """A game that remembers the worth of each set, and counts them."""

    def __init__(self, worth: Worth) -> None:
        """Know nothing yet.

        Args:
            worth: worth of a set.
        """
        self._worth = worth
        self._known: dict[tuple[int, ...], NDArray[np.float64]] = {}

    @property
    def num_sets(self) -> int:
        """Different sets that were met."""
        return len(self._known)

    def of(self, players: Sequence[int]) -> NDArray[np.float64]:
        """The worth of a set, computed when it is met first.

        Args:
            players: players in any order.
        """
        key = tuple(sorted(players))
        if key not in self._known:
            self._known[key] = np.asarray(self._worth(key), dtype=np.float64)
        return self._known[key]


def exact_values(game: MetOnce, num_players: int) -> NDArray[np.float64]:
    """Shapley values [S] or [S, Q], from all 2^S sets.

    Args:
        game: the game.
        num_players: number of players, S.
    """
    values = np.zeros((num_players, *game.of(()).shape))
    for player in range(num_players):
        others = [each for each in range(num_players) if each != player]
        for size in range(num_players):
            weight = 1.0 / (num_players * math.comb(num_players - 1, size))
            for chosen in combinations(others, size):
                values[player] += weight * (game.of((*chosen, player)) - game.of(chosen))
    return values


def sampled_values(
    game: MetOnce, num_players: int, seed: int, goes_on: Callable[[int], bool]
) -> NDArray[np.float64]:
    """Marginal worths [K, S] or [K, S, Q], each the mean over an order and its reverse.

    Args:
        game: the game.
        num_players: number of players, S.
        seed: seed of the orders.
        goes_on: function of the number of pairs that are done: whether one more is begun.
    """
    random = np.random.default_rng(seed)
    rows: list[NDArray[np.float64]] = []
    while goes_on(len(rows)):
        order = random.permutation(num_players).tolist()
        gains = np.zeros((num_players, *game.of(()).shape))
        for each in (order, order[::-1]):
            before = game.of(())
            for place, player in enumerate(each, 1):
                after = game.of(each[:place])
                gains[player] += (after - before) / 2
                before = after
        rows.append(gains)
    return np.asarray(rows)
