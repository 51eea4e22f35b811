from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlprompt.rewards import RewardSettings, build_rewards
from rlprompt.rewards.check.inputs import make_group
from rlprompt.rewards.rules.diversity import Diversity
from rlprompt.rewards.rules.group import PerGroup, win_rates


def shorter(query: str, left: str, right: str) -> float:
    return 0.5 if len(left) == len(right) else float(len(left) < len(right))


def rank(query: str, texts: Sequence[str]) -> list[float | None]:
    return win_rates(query, texts, shorter)


def test_win_rates_rank_a_group() -> None:
    assert rank("q", ["aaa", "a", "aa"]) == [0.0, 1.0, 0.5]
    assert rank("q", ["a", "b"]) == [0.5, 0.5]
    assert rank("q", ["a"]) == [None]


def test_win_rates_cancel_a_preference_for_a_place() -> None:
    assert win_rates("q", ["a", "b", "c"], lambda query, left, right: 1.0) == [0.5, 0.5, 0.5]


def test_a_group_function_sees_one_query_at_a_time_whatever_the_order() -> None:
    reward = PerGroup(rank)
    values = reward(["p", "q", "p", "q"], ["a", "aaaa", "aa", "aa"], [0, 1, 0, 1])
    assert values == [1.0, 0.0, 0.0, 1.0]
    assert pickle.loads(pickle.dumps(reward))(["p"] * 2, ["a", "bb"], [3, 3]) == [1.0, 0.0]


def test_diversity_is_one_without_overlap_and_zero_for_copies() -> None:
    reward = Diversity(ngram=1)
    assert reward(["q"] * 3, ["a b", "c d", "e f"], [0] * 3) == [1.0, 1.0, 1.0]
    assert reward(["q"] * 3, ["a b", "a b", "a b"], [0] * 3) == [0.0, 0.0, 0.0]
    # {a, b} and {b, c} share one of three words.
    assert reward(["q"] * 2, ["a b", "b c"], [0] * 2) == pytest.approx([2 / 3, 2 / 3])


def test_diversity_through_a_recipe_compares_siblings_only() -> None:
    runner = build_rewards([RewardSettings(path="builtin:diversity")], Path())
    groups = [make_group("p", {}, ["same text", "same text"]), make_group("q", {}, ["same text"])]
    values = runner.score(groups, step=0).values["diversity"].tolist()
    assert values[:2] == [0.0, 0.0]
    assert values[2] != values[2]  # alone: cannot be scored
