"""Roles: how score, gate, constraint and metric become totals, costs and metrics."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlprompt.rewards import LoadedReward, RewardRunner, RewardSettings
from rlprompt.rewards.check.inputs import make_group

GROUPS = [make_group("one?", {}, ["a", "b"]), make_group("two?", {}, ["c", "d"])]


def runner(*rewards: tuple[list[float | None], dict[str, Any]]) -> RewardRunner:
    loaded = []
    for index, (values, fields) in enumerate(rewards):
        settings = RewardSettings(path="x:y", name=f"r{index}", **fields)
        loaded.append(LoadedReward(settings, lambda values=values, **kwargs: values))
    return RewardRunner(loaded)


def test_only_scores_enter_the_total() -> None:
    made = runner(
        ([1.0, 2.0, 3.0, None], {"weight": 2.0}),
        ([9.0, 9.0, 9.0, 9.0], {"role": "metric"}),
        ([7.0, 7.0, 7.0, 7.0], {"role": "constraint", "limit": 1.0}),
        ([1.0, 0.0, 1.0, 1.0], {"role": "gate", "gate_floor": -3.0}),
    )
    total = made.score(GROUPS, step=0).total.tolist()
    assert total[:3] == [2.0, -3.0, 6.0]
    assert math.isnan(total[3])


def test_costs_are_signed_so_that_a_limit_is_an_upper_one() -> None:
    made = runner(
        ([0.0] * 4, {}),
        ([0.0, 0.2, 0.4, None], {"role": "constraint", "limit": 0.1}),
        ([0.0, 0.2, 0.4, 0.6], {"role": "constraint", "limit": 0.5, "bound": "at_least"}),
    )
    batch = made.score(GROUPS, step=0)
    assert made.cost_limits == {"r1": 0.1, "r2": -0.5}
    assert batch.costs["r1"][:3].tolist() == pytest.approx([0.0, 0.2, 0.4])
    assert batch.costs["r2"].tolist() == pytest.approx([0.0, -0.2, -0.4, -0.6])
    # Mean 0.2 is 0.1 above "at most 0.1"; mean 0.3 is 0.2 below "at least 0.5".
    assert batch.metrics["rewards/r1/violation"] == pytest.approx(0.1)
    assert batch.metrics["rewards/r2/violation"] == pytest.approx(0.2)
    for name, limit in made.cost_limits.items():
        known = batch.costs[name][~batch.costs[name].isnan()]
        violation = batch.metrics[f"rewards/{name}/violation"]
        assert float(known.mean()) - limit == pytest.approx(violation)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"role": "constraint"}, "has role 'constraint' and no limit; set limit"),
        ({"limit": 0.1}, "has role 'score', where limit has no effect"),
        ({"role": "gate", "bound": "at_least"}, "has role 'gate', where bound has no effect"),
        ({"role": "metric", "normalise": "batch"}, "where normalise has no effect"),
        ({"role": "constraint", "limit": 0.1, "weight": 2.0}, "where a weight has no effect"),
    ],
)
def test_settings_without_effect_are_errors(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RewardSettings(path="x:y", **fields)


def test_settings_written_out_in_full_can_be_read_again() -> None:
    for fields in ({}, {"role": "constraint", "limit": 0.0}, {"role": "gate"}):
        settings = RewardSettings(path="x:y", **fields)
        assert RewardSettings(**settings.model_dump(mode="json")) == settings


def test_a_reward_that_names_group_index_gets_it_and_no_other_does() -> None:
    seen: dict[str, Any] = {}

    def named(group_index: list[int], **kwargs: Any) -> list[float]:
        seen["named"] = group_index
        return [0.0] * 4

    def any_keywords(**kwargs: Any) -> list[float]:
        seen["others"] = set(kwargs)
        return [0.0] * 4

    rewards = [
        LoadedReward(RewardSettings(path="x:y", name="a"), named),
        LoadedReward(RewardSettings(path="x:y", name="b"), any_keywords),
    ]
    batch = RewardRunner(rewards).score(GROUPS, step=0)
    assert seen["named"] == [0, 0, 1, 1]
    assert batch.group_index == (0, 0, 1, 1)
    assert "group_index" not in seen["others"]
