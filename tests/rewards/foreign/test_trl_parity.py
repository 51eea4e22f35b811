"""TRL's own rewards run unchanged, named by dotted path, and give the values of a direct call."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlprompt.rewards import LoadedReward, RewardRunner, RewardSettings, build_rewards
from rlprompt.types import Completion, Group, Query

trl_rewards = pytest.importorskip("trl.rewards")

TEXTS = [
    "<think>\nwater boils\n</think>\nAt 100 degrees.",
    "<think>no end",
    "again again again again",
    r"\boxed{\frac{1}{3}}",
]
IDS = [[1, 2, 3, 4, 5], [9], [5, 5, 5, 5, 5, 5], [1, 2, 1, 2, 1, 2]]
QUERY = Query(({"role": "user", "content": "What?"},), {"solution": r"\frac{1}{3}"})
GROUP = Group(
    QUERY,
    tuple(
        Completion(tuple(ids), (0.0,) * len(ids), text, True)
        for ids, text in zip(IDS, TEXTS, strict=True)
    ),
)
MESSAGES = [[{"role": "assistant", "content": text}] for text in TEXTS]


def run(path: str, **options: Any) -> list[float]:
    runner = build_rewards([RewardSettings(path=path, name="r", options=options)], Path())
    values: list[float] = runner.score([GROUP], step=0).values["r"].tolist()
    runner.close()
    return values


def test_think_format_reward() -> None:
    direct = trl_rewards.think_format_reward(completions=MESSAGES)
    assert run("trl.rewards.think_format_reward") == direct == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("options", [{}, {"ngram_size": 2, "max_penalty": -0.5}])
def test_repetition_penalty(options: dict[str, Any]) -> None:
    direct = trl_rewards.get_repetition_penalty_reward(**options)(completion_ids=IDS)
    assert run("trl.rewards:get_repetition_penalty_reward", **options) == pytest.approx(direct)
    assert min(direct) < 0.0


def test_soft_overlong_punishment() -> None:
    options = {"max_completion_len": 6, "soft_punish_cache": 4}
    direct = trl_rewards.get_soft_overlong_punishment(**options)(completion_ids=IDS)
    assert run("trl.rewards.get_soft_overlong_punishment", **options) == pytest.approx(direct)
    assert min(direct) < 0.0


def test_accuracy_reward() -> None:
    if importlib.util.find_spec("math_verify") is None:
        pytest.skip("math_verify is not installed")
    solutions = [r"\frac{1}{3}"] * len(TEXTS)
    direct = trl_rewards.accuracy_reward(completions=MESSAGES, solution=solutions)
    assert run("trl.rewards.accuracy_reward") == direct


def call_by_trl(function: Any) -> dict[str, Any]:
    """What `GRPOTrainer._calculate_rewards` hands to a reward for the rows of GROUP."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    seen: dict[str, Any] = {}

    def spy(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        values: list[float] = function(**kwargs)
        return values

    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True),
        args=SimpleNamespace(report_to=[]),
        state=SimpleNamespace(global_step=3),
        environments=None,
        reward_funcs=[spy],
        reward_processing_classes=[None],
        reward_func_names=["spy"],
        _log_completion_extra=lambda column, values: None,
        _log_metric=lambda name, value: None,
    )
    messages = [dict(message) for message in QUERY.messages]
    inputs = [{"prompt": messages, **QUERY.columns} for _ in TEXTS]
    grpo_trainer.GRPOTrainer._calculate_rewards(
        trainer, inputs, [messages] * len(TEXTS), MESSAGES, IDS
    )
    return seen


def test_the_runner_calls_a_reward_as_grpo_trainer_does() -> None:
    seen: dict[str, Any] = {}

    def spy(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0] * len(TEXTS)

    reward = LoadedReward(RewardSettings(path="x:y", name="r"), spy)
    RewardRunner([reward]).score([GROUP], step=3)
    theirs = call_by_trl(spy)
    assert seen.keys() == theirs.keys()
    for key in ("prompts", "completions", "completion_ids", "solution"):
        assert seen[key] == theirs[key]
    assert seen["trainer_state"].global_step == theirs["trainer_state"].global_step
