"""Shapley values of games whose values are known, and of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from rlprompt.interpret.clock import Slice
from rlprompt.interpret.importance import importances, plain, shapley, spans_of
from rlprompt.interpret.yardstick import Yardstick
from rlprompt.prompts.soft import SoftPrompt
from tests.fixtures.prompts import KINDS, make
from tests.interpret.subjects import Ticks, answers, ended, forever, tiny_policy


def test_players_of_an_additive_game_have_what_they_bring() -> None:
    brings = [3.0, 1.0, 0.0, -2.0]
    rows = shapley(lambda players: sum(brings[p] for p in players), 4, 0, forever())
    assert np.asarray(rows) == pytest.approx(np.asarray([brings] * len(rows)))


def test_players_who_need_each_other_share_equally() -> None:
    """Two of three together win: by symmetry all have a third, in the mean over orders."""
    rows = np.asarray(shapley(lambda players: float(len(players) >= 2), 3, 0, forever()))
    assert rows.sum(axis=1) == pytest.approx(1.0)
    errors = rows.std(axis=0, ddof=1) / np.sqrt(len(rows))
    assert (np.abs(rows.mean(axis=0) - 1 / 3) <= 3 * errors).all()
    pair = np.asarray(shapley(lambda players: float({0, 1} <= set(players)), 3, 0, forever()))
    assert pair.mean(axis=0) == pytest.approx([0.5, 0.5, 0.0])  # an order and its reverse


def test_a_set_is_met_once() -> None:
    met: list[Sequence[int]] = []

    def worth(players: Sequence[int]) -> float:
        met.append(tuple(players))
        return float(len(players))

    shapley(worth, 3, 0, forever())
    assert len(met) == len(set(met)) <= 8


def test_time_ends_between_pairs_of_orders() -> None:
    assert shapley(lambda players: 0.0, 3, 0, ended()) == []
    assert len(shapley(lambda players: 0.0, 3, 0, Slice(2.5, Ticks()))) == 2


@pytest.mark.parametrize(
    ("num_positions", "count"), [(1, 1), (5, 5), (16, 16), (17, 16), (4096, 16)]
)
def test_positions_are_cut_into_spans(num_positions: int, count: int) -> None:
    spans = spans_of(num_positions)
    assert len(spans) == count
    assert [place for span in spans for place in span] == list(range(num_positions))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_values_add_up_to_what_the_prompt_does(kind: str) -> None:
    policy = tiny_policy()
    prompt = make(kind, policy, noise=1.0)
    found = importances(
        Yardstick(policy, prompt, answers(policy, prompt, 1)),
        prompt,
        seed=0,
        time=Slice(2.5, Ticks()),
    )
    assert found is not None and found.shapley is not None and found.errors is not None
    assert sum(found.shapley) == pytest.approx(found.whole, abs=1e-5) and found.whole > 0
    assert min(found.errors) >= 0
    assert plain(found, None)["method"] == ("recomputed" if kind in ("soft", "text") else "masked")


def test_ablations_are_made_without_time_too() -> None:
    policy = tiny_policy()
    prompt = make("soft", policy, noise=1.0)
    assert isinstance(prompt, SoftPrompt)
    yardstick = Yardstick(policy, prompt, answers(policy, prompt, 2))
    found = importances(yardstick, prompt, seed=0, time=ended())
    assert found is not None and found.shapley is None and found.num_orders == 0
    assert len(found.alone) == prompt.num_virtual_tokens and min(found.alone) > 0
