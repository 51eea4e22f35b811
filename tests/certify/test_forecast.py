"""The forecast: components against a simulation, and what is said of tables made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlprompt.certify.forecast import forecast, prompt_signal, signal


def table(
    prompts: float, both: float, chance: float, seed: int, shape: tuple[int, int, int] = (6, 200, 4)
) -> np.ndarray:
    """Rewards of a two-way model with these standard deviations, and queries that differ by 1."""
    draw = np.random.default_rng(seed)
    size = (shape[0], shape[1], 1)
    return (
        draw.normal(0, prompts, (shape[0], 1, 1))
        + draw.normal(0, 1, (1, shape[1], 1))
        + draw.normal(0, both, size)
        + draw.normal(0, chance, shape)
    )


def test_components_are_those_that_the_table_was_made_with() -> None:
    found = [forecast(table(0.5, 1.0, 2.0, seed)) for seed in range(60)]
    whole = 0.5**2 + 1.0**2 + 2.0**2
    assert np.mean([f.prompt_share for f in found]) == pytest.approx(0.25 / whole, abs=0.015)
    assert np.mean([f.query_prompt_share for f in found]) == pytest.approx(1 / whole, abs=0.01)
    assert np.mean([f.chance_share for f in found]) == pytest.approx(4 / whole, abs=0.02)
    for f in found:
        assert f.prompt_share + f.query_prompt_share + f.chance_share == pytest.approx(1.0)


def test_equal_prompts_are_called_different_as_often_as_stated() -> None:
    values = [forecast(table(0.0, 0.5, 1.0, seed, (3, 20, 3))).p_value for seed in range(400)]
    assert np.mean(np.array(values) < 0.05) == pytest.approx(0.05, abs=0.03)


def test_prompts_that_differ_can_help() -> None:
    rewards = table(0.0, 0.3, 0.5, 1, (3, 40, 4))
    rewards[2] += 1.0
    found = forecast(rewards)
    assert found.outlook == "yes" and found.gain == pytest.approx(1.0, abs=0.3)
    assert found.sentence.startswith("prompts can help: they differ by more than chance (p = ")
    assert found.group_spread == pytest.approx(0.5, abs=0.1) and found.flat_groups == 0.0
    assert found.best_of_n > found.means[0]


def test_the_queries_that_a_difference_needs_give_the_power_that_is_said() -> None:
    needed = forecast(table(0.0, 0.6, 1.0, 2, (2, 4000, 2))).queries_needed(0.3)
    # One query's difference has variance 2 * (0.36 + 1 / 2).
    assert needed == pytest.approx((1.96 + 0.8416) ** 2 * 1.72 / 0.09, rel=0.1)
    seen = 0
    for seed in range(300):
        rewards = table(0.0, 0.6, 1.0, 1000 + seed, (2, needed, 2))
        gains = (rewards[1] + 0.3 - rewards[0]).mean(axis=1)
        seen += abs(gains.mean()) / (gains.std(ddof=1) / needed**0.5) > 1.96
    assert seen / 300 == pytest.approx(0.8, abs=0.07)


def test_a_reward_that_is_always_the_same_may_be_a_rare_one() -> None:
    """Topics by the bare label: nothing before training, 0.9 after it (docs/results.md)."""
    by_query = np.broadcast_to(np.arange(5.0)[None, :, None], (3, 5, 4)).copy()
    for rewards in (np.ones((3, 5, 4)), by_query):
        found = forecast(rewards)
        assert found.is_flat
        assert (found.outlook, found.flat_groups, found.p_value) == ("unclear", 1.0, 1.0)
        assert "same reward" in found.sentence and "at most 45% of queries" in found.sentence
        assert found.queries_needed(0.1) == 2


def test_a_reward_that_is_noise_teaches_nothing() -> None:
    draw = np.random.default_rng(3)
    rewards = draw.normal(0, 1, (2, 100, 4))
    assert forecast(rewards).outlook == "unclear"
    found = forecast(rewards, draw.normal(0, 1, (100, 4)))
    assert found.outlook == "no" and found.noise == pytest.approx(1.0, abs=0.1)
    assert "own noise" in found.sentence
    assert math.isnan(forecast(rewards).noise) and forecast(rewards, rewards[0]).noise == 0.0


def test_prompts_that_differ_without_any_chance_are_seen() -> None:
    rewards = np.zeros((2, 4, 2))
    rewards[1] = 1.0
    found = forecast(rewards)
    assert (found.outlook, found.p_value, found.prompt_share) == ("yes", 0.0, 1.0)


def test_queries_with_a_missing_reward_are_left_out_and_counted() -> None:
    rewards = table(0.0, 0.3, 0.5, 4, (2, 6, 3))
    rewards[1, 2, 0] = rewards[0, 5, 1] = np.nan
    found = forecast(rewards)
    assert (found.num_queries, found.num_dropped) == (4, 2)
    assert found.means == forecast(rewards[:, [0, 1, 3, 4]]).means


def test_signal_is_the_spread_of_each_group() -> None:
    nan = math.nan
    spread = signal(np.array([[0.0, 1.0], [0.5, 0.5], [nan, 1.0], [nan, nan]]))
    assert spread[:2] == pytest.approx([0.5**0.5, 0.0])
    assert np.isnan(spread[2:]).all()


def test_what_is_too_small_is_refused() -> None:
    for shape in ((1, 4, 2), (2, 1, 2), (2, 4, 1), (2, 4)):
        with pytest.raises(ValueError, match="two prompts, queries and completions"):
            forecast(np.zeros(shape))
    with pytest.raises(ValueError, match="1 of 3 queries were scored in full"):
        forecast(np.array([[[1.0, 1.0], [math.nan, 0.0], [math.nan, 0.0]]] * 2))
    for difference in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="give one above 0"):
            forecast(np.ones((2, 3, 2))).queries_needed(difference)


def test_the_share_between_prompts_of_a_mean_is_that_of_many_means() -> None:
    """Against means over batches of queries that are drawn anew, as arXiv 2604.08801 has it."""
    found = forecast(table(0.5, 1.0, 2.0, 3, (200, 300, 4)))
    between, within = [], []
    for seed in range(40):
        rewards = table(0.5, 1.0, 2.0, 100 + seed, (200, 5, 4))
        means = rewards.mean(axis=(1, 2))
        chance = rewards.var(axis=2, ddof=1).mean() / (5 * 4)
        between.append(means.var(ddof=1) - chance)
        within.append(chance)
    share = np.mean(between) / (np.mean(between) + np.mean(within))
    assert found.between_share(5, 4) == pytest.approx(share, abs=0.03)
    # More queries that favour different prompts take from it; what prompts do on all stays.
    assert found.between_share(1, 1) == pytest.approx(found.prompt_share + found.query_prompt_share)
    assert found.between_share(1, 100) > found.between_share(4, 25)


def test_a_table_without_variance_has_no_share_between_prompts() -> None:
    assert forecast(np.zeros((2, 3, 2))).between_share(4, 2) == 0.0


def test_queries_on_which_prompts_differ_are_found() -> None:
    rewards = table(0.0, 0.0, 0.1, 0, (4, 6, 8))
    rewards[:, 2] += np.array([0.0, 1.0, 2.0, 3.0])[:, None]
    rewards[1, 4, 0] = float("nan")
    found = prompt_signal(rewards)
    assert found[2] == pytest.approx(np.std([0, 1, 2, 3], ddof=1), abs=0.1)
    assert np.isnan(found[4]) and (np.delete(found, [2, 4]) < 0.1).all()
