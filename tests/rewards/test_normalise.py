from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.rewards import LoadedReward, RewardRunner, RewardSettings
from rlprompt.rewards.base import Normalise
from rlprompt.rewards.check.inputs import make_group
from rlprompt.rewards.normalise import RunningStatistics


def test_running_statistics_are_those_of_all_numbers_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    chunks = [torch.randn(n, generator=generator) * 3 + 100 for n in (1, 7, 0, 64, 2)]
    stats = RunningStatistics()
    for chunk in chunks:
        stats.update(chunk)
    everything = torch.cat(chunks).double()
    assert stats.count == everything.numel()
    assert stats.mean == pytest.approx(float(everything.mean()), rel=1e-9)
    assert stats.std == pytest.approx(float(everything.std()), rel=1e-6)


def runner(mode: Normalise, tables: list[Tensor], weights: list[float]) -> RewardRunner:
    """Rewards that return rows of tables, one table [steps, B] per reward."""
    rewards = []
    for index, (table, weight) in enumerate(zip(tables, weights, strict=True)):

        def reward(trainer_state: Any, table: Tensor = table, **kwargs: Any) -> list[float | None]:
            row = table[trainer_state.global_step].tolist()
            return [None if math.isnan(value) else value for value in row]

        settings = RewardSettings(path="x:y", name=f"r{index}", weight=weight, normalise=mode)
        rewards.append(LoadedReward(settings, reward))
    return RewardRunner(rewards)


GROUPS = [make_group(f"{i}?", {}, ["a", "b", "c"]) for i in range(2)]


def random_tables(count: int, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(steps, 6, generator=generator) * 10**i + i for i in range(count)]


def test_group_normalisation_is_that_of_trl() -> None:
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    tables = random_tables(2, 1)
    tables[1][0, 2] = math.nan
    tables[0][0, 3:] = 4.0  # a group without spread
    made = runner("group", tables, [1.0, 0.5])
    ours = made.training_rewards(made.score(GROUPS, step=0))
    grouped = torch.stack([table[0] for table in tables], dim=1).view(2, 3, 2)
    mean = torch.nanmean(grouped, dim=1, keepdim=True)
    std = grpo_trainer.nanstd(grouped, dim=1, keepdim=True)
    theirs = ((grouped - mean) / (std + 1e-4)).view(6, 2)
    expected = (theirs * torch.tensor([1.0, 0.5])).nansum(dim=1)
    torch.testing.assert_close(ours, expected)


def test_batch_normalisation_has_mean_0_and_deviation_1() -> None:
    made = runner("batch", random_tables(1, 1), [1.0])
    trained_on = made.training_rewards(made.score(GROUPS, step=0))
    assert float(trained_on.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(trained_on.std()) == pytest.approx(1.0, abs=1e-3)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_running_normalisation_uses_all_values_so_far_and_resumes() -> None:
    (table,) = random_tables(1, 3)
    made = runner("running", [table], [1.0])
    for step in range(2):
        made.training_rewards(made.score(GROUPS, step=step))
    resumed = runner("running", [table], [1.0])
    resumed.load_state_dict(made.state_dict())
    for each in (made, resumed):
        trained_on = each.training_rewards(each.score(GROUPS, step=2))
        expected = (table[2] - table.mean()) / (table.std() + 1e-4)
        torch.testing.assert_close(trained_on, expected, rtol=1e-4, atol=1e-5)
    assert same(made.state_dict(), resumed.state_dict())


def test_scoring_alone_changes_no_statistics_and_no_total() -> None:
    (table,) = random_tables(1, 1)
    made = runner("running", [table], [2.0])
    before = made.state_dict()
    torch.testing.assert_close(made.score(GROUPS, step=0).total, 2 * table[0])
    assert same(made.state_dict(), before)


def test_a_state_of_other_rewards_is_refused() -> None:
    made = runner("running", random_tables(1, 1), [1.0])
    with pytest.raises(InputError, match="are of the rewards \\['other'\\]"):
        made.load_state_dict({"other": torch.tensor([1.0, 0.0, 0.0])})


def test_without_normalisation_the_total_is_trained_on() -> None:
    made = runner("none", random_tables(1, 1), [1.0])
    batch = made.score(GROUPS, step=0)
    assert made.training_rewards(batch) is batch.total


def test_a_gate_vetoes_the_normalised_total_too() -> None:
    settings = [
        RewardSettings(path="x:y", name="s", normalise="batch"),
        RewardSettings(path="x:y", name="g", role="gate", gate_floor=-5.0),
    ]
    values = SimpleNamespace(s=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], g=[1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    made = RewardRunner(
        [
            LoadedReward(each, lambda each=each, **kwargs: getattr(values, each.name))
            for each in settings
        ]
    )
    trained_on = made.training_rewards(made.score(GROUPS, step=0))
    assert trained_on[5] == -5.0
    assert trained_on[4] == trained_on[:5].max()
