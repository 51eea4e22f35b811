"""Shapley values on rewards: they add up to the gain, and their errors are those of the queries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlprompt.interpret.derived import CutPrompt, vectors_of
from rlprompt.interpret.reward_importance import (
    reward_importance,
    runs_for,
    standard_errors,
)
from rlprompt.policy import Policy
from rlprompt.rewards import RewardSettings, build_rewards
from rlprompt.rewards.runner import RewardRunner
from tests.fixtures.prompts import make
from tests.interpret.subjects import ended, forever, subject, tiny_policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture(scope="module")
def rewards() -> RewardRunner:
    settings = RewardSettings(path="builtin:length", options={"min": 1, "max": 3, "unit": "words"})
    return build_rewards([settings], Path())


@pytest.mark.parametrize(
    ("positions", "sets", "count", "exact"),
    [
        (16, 16, 4, True),
        (2, 1000, 2, True),
        (9, 4, 2, True),
        (16, 63, 5, True),
        (16, 64, 16, False),
        (40, 500, 16, False),
        (5, 32, 5, True),
        (6, 31, 6, False),
    ],
)
def test_a_budget_of_sets_says_how_many_runs_are_looked_at(
    positions: int, sets: int, count: int, exact: bool
) -> None:
    spans, is_exact = runs_for(positions, sets)
    assert (len(spans), is_exact) == (count, exact)
    assert [place for span in spans for place in span] == list(range(positions))


@pytest.mark.parametrize(("sets", "exact"), [(8, True), (200, None)])
def test_values_add_up_to_the_gain(
    policy: Policy, rewards: RewardRunner, sets: int, exact: bool | None
) -> None:
    prompt = make("soft", policy, noise=0.5)
    found = subject(policy, prompt, rewards)
    rows = reward_importance(found, sets, None, forever())
    assert rows is not None and rows["num_queries"] == 6
    total = sum(row["shapley"] for row in rows["spans"])
    own, vectors = found.reward_means(prompt), vectors_of(policy, prompt)
    assert own is not None and vectors is not None
    none = found.reward_means(CutPrompt(vectors[:0]))
    assert none is not None
    assert total == pytest.approx(float((own - none).mean()), abs=1e-9)
    assert total == pytest.approx(rows["whole"] - rows["empty"], abs=1e-9)
    assert all(row["error"] >= 0 for row in rows["spans"])
    if exact:
        assert rows["is_exact"] and rows["sets"] == 8 and len(rows["spans"]) == 3


def test_what_cannot_be_measured_is_left_out(policy: Policy, rewards: RewardRunner) -> None:
    assert reward_importance(subject(policy, make("soft", policy)), 16, None, forever()) is None
    prefix = make("prefix", policy)
    assert reward_importance(subject(policy, prefix, rewards), 16, None, forever()) is None
    soft = subject(policy, make("soft", policy), rewards)
    assert reward_importance(soft, 16, None, ended()) is None


def test_errors_are_those_of_queries_and_of_orders() -> None:
    random = np.random.default_rng(0)
    exact = random.normal(size=(1, 2, 40))
    expected = exact[0].std(axis=1, ddof=1) / np.sqrt(40)
    assert standard_errors(exact) == pytest.approx(expected)
    orders = np.tile(random.normal(size=(5, 2, 1)), (1, 1, 40))  # queries are alike
    assert standard_errors(orders) == pytest.approx(
        orders[:, :, 0].std(axis=0, ddof=1) / np.sqrt(5)
    )
