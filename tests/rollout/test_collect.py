"""From queries to scored completions, their metrics and their rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.rewards.base import LoadedReward, RewardBatch, RewardSettings
from rlprompt.rewards.runner import RewardRunner
from rlprompt.rollout.collect import RolloutBatch, collect, completion_metrics, completion_rows
from rlprompt.types import Group, Query
from tests.fixtures.runs import completion, queries, scored, tiny_policy

NAN = math.nan


def query(text: str, index: int) -> Query:
    return Query(({"role": "user", "content": text},), index=index)


def groups() -> list[Group]:
    return [
        Group(query("q0", 7), (completion(5, 1, text="a"), completion(6, 6, 6, terminated=False))),
        Group(query("q1", 3), (completion(1), completion(5, 5, 5, 5, 5, 1, text="b"))),
    ]


def test_completions_are_drawn_and_scored_group_by_group() -> None:
    policy = tiny_policy()
    engine = NativeEngine(policy)
    engine.sync(policy.prompt)
    steps: list[int] = []

    def reward(
        completion_ids: Sequence[Sequence[int]], trainer_state: Any, **_: Any
    ) -> list[float]:
        steps.append(trainer_state.global_step)
        return [float(len(ids)) for ids in completion_ids]

    runner = RewardRunner([LoadedReward(RewardSettings(path="here:reward"), reward)])
    sampling = SamplingSettings(max_tokens=5, stop_token_ids=tuple(range(10, 60)))

    def drawn(seed: int) -> RolloutBatch:
        return collect(lambda: engine.generate(queries(3), 4, sampling, seed), runner, step=9)

    batch = drawn(seed=1)
    assert steps == [9]
    assert [len(group.completions) for group in batch.groups] == [4, 4, 4]
    assert batch.rewards.total.tolist() == batch.lengths.tolist()
    assert batch.terminated.tolist() == [c.terminated for c in batch.completions]
    assert 0 < int(batch.terminated.sum()) < 12
    assert batch.rollout_seconds > 0 and batch.reward_seconds > 0
    assert drawn(seed=1).groups == batch.groups != drawn(seed=2).groups


def test_metrics_have_trls_names_and_meanings() -> None:
    metrics = completion_metrics(scored(groups(), [1.0, 2.0, NAN, 6.0]))
    assert metrics["completions/mean_length"] == 3.0
    assert (metrics["completions/min_length"], metrics["completions/max_length"]) == (1.0, 6.0)
    assert metrics["completions/clipped_ratio"] == 0.25
    assert metrics["completions/mean_terminated_length"] == 3.0
    assert metrics["completions/min_terminated_length"] == 1.0
    assert metrics["completions/max_terminated_length"] == 6.0
    assert metrics["reward"] == 3.0
    assert metrics["reward_std"] == pytest.approx(float(torch.tensor([1.0, 2.0, 6.0]).std()))


def test_a_mean_over_nothing_is_left_out() -> None:
    cut = [Group(queries(1)[0], (completion(5, 5, terminated=False),))]
    metrics = completion_metrics(scored(cut, [NAN]))
    assert not any(name.startswith("reward") or "terminated" in name for name in metrics)
    assert "reward_std" not in completion_metrics(scored(cut, [1.0]))


def test_rows_say_what_was_asked_written_and_scored() -> None:
    rows = completion_rows(
        scored(groups(), [1.0, 2.0, NAN, 6.0]), "train", "learned", torch.tensor([0.5, -0.5, 0, 0])
    )
    assert rows[0] == {
        "split": "train",
        "who": "learned",
        "query_index": 7,
        "query": "q0",
        "completion": "a",
        "reward": 1.0,
        "rewards": {"r": 1.0},
        "terminated": True,
        "num_tokens": 2,
        "advantage": 0.5,
    }
    assert [row["query_index"] for row in rows] == [7, 7, 3, 3]
    assert [row["terminated"] for row in rows] == [True, False, True, True]
    assert completion_rows(scored(groups(), [0.0] * 4), "heldout", "base")[3]["advantage"] is None


def test_what_rewards_log_never_hides_what_the_row_says() -> None:
    plain = scored(groups(), [1.0, 2.0, 3.0, 4.0])
    extras = {"judge": list("wxyz"), "reward": [9, 9, 9, 9], "step": [8, 8, 8, 8]}
    rewards = RewardBatch(**{**plain.rewards.__dict__, "extras": extras})
    row = completion_rows(RolloutBatch(plain.groups, rewards, 0, 0), "train", "learned")[1]
    assert (row["judge"], row["reward"], row["extra.reward"]) == ("x", 2.0, 9)
    assert row["extra.step"] == 8 and "step" not in row
