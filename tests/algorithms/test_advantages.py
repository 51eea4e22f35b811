"""Group-relative advantages and the global normaliser, by their properties."""

from __future__ import annotations

import math

import pytest
import torch

from rlprompt.algorithms.advantages import (
    Normalizer,
    Scale,
    batch_advantages,
    group_advantages,
    groups_with_spread,
    leave_one_out_advantages,
    row_weights,
    share_without_spread,
)

SCALES: list[Scale] = ["group", "batch", "mean", "none"]
NORMALIZERS: list[Normalizer] = ["sequence", "token", "constant"]
NAN = math.nan


def some_rewards(groups: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(groups * size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_group_has_mean_zero(scale: Scale, size: int) -> None:
    advantages = group_advantages(some_rewards(5, size).abs(), size, scale)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages.view(5, size).mean(1), torch.zeros(5), rtol=0, atol=1e-6)


def test_group_scaling_gives_unit_deviation_whatever_the_units() -> None:
    rewards = some_rewards(3, 8)
    advantages = group_advantages(rewards, 8, "group").view(3, 8)
    torch.testing.assert_close(advantages.std(1), torch.ones(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        group_advantages(1000 * rewards + 7, 8, "group").view(3, 8), advantages, rtol=0, atol=1e-3
    )


def test_batch_scaling_keeps_the_groups_relative_size() -> None:
    rewards = torch.tensor([0.0, 1.0, 0.0, 10.0])
    advantages = group_advantages(rewards, 2, "batch")
    assert advantages[3] / advantages[1] == pytest.approx(10.0)
    assert float(advantages[3]) == pytest.approx(5.0 / (float(rewards.std()) + 1e-4))


def test_no_scaling_is_the_distance_to_the_mean() -> None:
    advantages = group_advantages(torch.tensor([1.0, 4.0, NAN, 1.0]), 4, "none")
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 2.0, 0.0, -1.0]))


def test_division_by_the_mean_weighs_a_group_by_how_rarely_it_succeeds() -> None:
    rare, often, never = [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0] * 4
    advantages = group_advantages(torch.tensor(rare + often + never), 4, "mean").view(3, 4)
    torch.testing.assert_close(advantages[0], torch.tensor([3.0, -1.0, -1.0, -1.0]))
    torch.testing.assert_close(advantages[1], torch.tensor([1 / 3, 1 / 3, 1 / 3, -1.0]))
    assert advantages[2].tolist() == [0.0] * 4
    scaled = group_advantages(1e-9 * torch.tensor(rare), 4, "mean")
    torch.testing.assert_close(scaled, advantages[0])


def test_a_mean_divides_no_negative_rewards() -> None:
    with pytest.raises(ValueError, match=r"a reward is -0\.5"):
        group_advantages(torch.tensor([1.0, -0.5, NAN, 2.0]), 2, "mean")


@pytest.mark.parametrize("scale", SCALES)
def test_unscored_completions_get_zero_and_do_not_move_the_others(scale: Scale) -> None:
    with_nan = torch.tensor([1.0, NAN, 3.0, NAN, NAN, NAN])
    advantages = group_advantages(with_nan, 3, scale)
    assert advantages[[1, 3, 4, 5]].tolist() == [0.0] * 4
    assert advantages[0] == -advantages[2] != 0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1000.3, 1e7, 3e37])
@pytest.mark.parametrize("size", [3, 7, 8])
def test_equal_rewards_teach_exactly_nothing(scale: Scale, value: float, size: int) -> None:
    value = abs(value) if scale == "mean" else value
    assert group_advantages(torch.full((2 * size,), value), size, scale).tolist() == [0.0] * (
        2 * size
    )


def test_a_group_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="7 rewards do not fill groups of 2"):
        group_advantages(torch.zeros(7), 2, "none")


def test_leave_one_out_is_the_distance_to_the_mean_of_the_others() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, NAN, 4.0])
    advantages = leave_one_out_advantages(rewards, 3)
    assert advantages.tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, -4.0, 0.0, 4.0]
    others = group_advantages(rewards[:3], 3, "none")
    torch.testing.assert_close(advantages[:3], others * 3 / 2)


def test_leave_one_out_of_a_lone_score_and_of_equal_rewards_is_zero() -> None:
    rewards = torch.tensor([3.0, NAN, NAN, 1000.3, 1000.3, 1000.3])
    assert leave_one_out_advantages(rewards, 3).tolist() == [0.0] * 6
    with pytest.raises(ValueError, match="7 rewards do not fill groups of 2"):
        leave_one_out_advantages(torch.zeros(7), 2)


def test_a_baseline_of_the_others_leaves_the_gradient_unbiased() -> None:
    """Summed over all pairs of two actions, weighted by their probability: exactly the gradient."""
    probs = torch.tensor([0.2, 0.8], dtype=torch.float64)
    values = torch.tensor([1.0, 3.0])
    exact = probs * (values.double() - (probs * values).sum())  # with respect to the logits
    found = torch.zeros(2, dtype=torch.float64)
    for i in range(2):
        for j in range(2):
            advantages = leave_one_out_advantages(values[[i, j]], 2).double()
            for action, advantage in zip((i, j), advantages, strict=True):
                score = torch.nn.functional.one_hot(torch.tensor(action), 2) - probs
                found += probs[i] * probs[j] * advantage * score / 2
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def test_the_baseline_of_a_batch_is_its_mean() -> None:
    advantages = batch_advantages(torch.tensor([1.0, NAN, 3.0, 8.0]), normalize=False)
    assert advantages.tolist() == [-3.0, 0.0, -1.0, 4.0]
    scaled = batch_advantages(torch.tensor([1.0, NAN, 3.0, 8.0]), normalize=True)
    torch.testing.assert_close(scaled, advantages / (13**0.5 + 1e-4))
    assert batch_advantages(torch.full((5,), 0.1), normalize=True).tolist() == [0.0] * 5


def test_groups_with_spread_are_those_that_teach() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, NAN, 2.0])
    assert groups_with_spread(rewards, 2).tolist() == [False, True, False]


def test_share_without_spread_counts_flat_and_unscored_groups() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, NAN, NAN, NAN, 2.0])
    assert float(share_without_spread(rewards, 2)) == 0.75


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_any_cut_into_micro_batches_sums_to_the_whole(normalizer: Normalizer) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 9, (12,), generator=generator)
    values = torch.randn(12, 9, generator=generator)
    mask = torch.arange(9)[None] < lengths[:, None]
    weights = row_weights(lengths, normalizer, 9)[:, None] * mask
    whole = (weights * values).sum()
    for _ in range(5):
        order = torch.randperm(12, generator=generator)
        parts = [(weights[rows] * values[rows]).sum() for rows in order.tensor_split([1, 4, 5, 10])]
        torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-6)


def test_normalizers_are_the_means_that_they_promise() -> None:
    lengths = torch.tensor([1, 4, 0])
    per_token = {name: row_weights(lengths, name, 10).tolist() for name in NORMALIZERS}
    assert per_token["sequence"] == pytest.approx([1 / 3, 1 / 12, 0])
    assert per_token["token"] == pytest.approx([1 / 5, 1 / 5, 0])
    assert per_token["constant"] == pytest.approx([1 / 30, 1 / 30, 0])


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_batch_in_which_nothing_counts_has_weight_zero(normalizer: Normalizer) -> None:
    assert row_weights(torch.zeros(3, dtype=torch.int64), normalizer, 8).tolist() == [0.0] * 3
