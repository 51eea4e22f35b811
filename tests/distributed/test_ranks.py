"""Several ranks are one run: real processes over gloo against one process."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlprompt.distributed.ranks import DistributedSettings, Ranks, join_ranks, meeting_place
from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.runs.checkpoint import load_checkpoint
from tests.cli.runs import REWARD, rlprompt, write_recipe
from tests.fixtures.ranks import outcome, run_ranks, start_ranks
from tests.fixtures.runs import comparable_rows
from tests.fixtures.tiny import save_tiny

TOLERANCE = 2e-5
"""Largest difference of a metric, relative to its size or 1: the order of sums differs."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


STOPS_FIRST_RANK = """
import os, signal
own = reward

def reward(completions, trainer_state, **kwargs):
    if trainer_state.global_step == 1 and trainer_state.is_world_process_zero:
        os.kill(os.getpid(), signal.SIGTERM)
    return own(completions)
"""


def recipe_of(folder: Path, model_dir: Path, **changes: Any) -> Path:
    """Five queries per step, so that two ranks have different shares."""
    plain = {
        "training": {"steps": 3, "queries_per_step": 3, "save_every": 1, "token_budget": 64},
        "algorithm": {"group_size": 4, "kl_coef": 0.05, "num_minibatches": 2, "num_epochs": 2},
        "evaluation": {"every": 2, "completions_per_query": 2},
        "tracking": {"trackers": ["jsonl"]},
    }
    return write_recipe(folder, model_dir, **{**plain, **changes})


def assert_close_runs(one: Path, two: Path, tolerance: float = TOLERANCE) -> None:
    """Equal texts, and numbers that differ by the order of sums only."""
    for kind in ("metrics", "completions", "evaluation"):
        first, second = (comparable_rows(output, kind) for output in (one, two))
        assert len(first) == len(second) > 0
        for a, b in zip(first, second, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert_close(a[key], b[key], f"{kind} {key}", tolerance)
    prompts = [load_checkpoint(o / "checkpoints").tensors for o in (one, two)]
    names = [name for name in prompts[0] if name.startswith("prompt/")]
    assert names
    for name in names:
        assert (prompts[0][name] - prompts[1][name]).abs().max() < tolerance, name


def assert_close(a: Any, b: Any, where: str, tolerance: float) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_close(a[key], b[key], f"{where} {key}", tolerance)
    elif isinstance(a, float) and isinstance(b, float):
        assert abs(a - b) <= tolerance * max(1.0, abs(a)), (where, a, b)
    else:
        assert a == b, where


@pytest.mark.slow
def test_two_ranks_are_one_and_a_run_goes_on_with_another_number(
    tmp_path: Path, model_dir: Path
) -> None:
    recipe = recipe_of(tmp_path, model_dir)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert rlprompt("train", recipe, "-o", one).code == 0
    ended = run_ranks(2, tmp_path / "logs", "train", recipe, "-o", two)
    assert ended.codes == [0, 0], ended.logs
    assert_close_runs(one, two)
    shown = "the learned prompt is"
    assert shown in ended.logs[0] and shown not in ended.logs[1]
    # The first two steps on three ranks (one of them without a held-out query), the last on one.
    (tmp_path / "reward.py").write_text(REWARD + STOPS_FIRST_RANK)
    ended = run_ranks(3, tmp_path / "logs3", "train", recipe, "-o", three, "--stop-exit-code", 85)
    assert ended.codes == [85] * 3, ended.logs
    assert load_checkpoint(three / "checkpoints").step == 2
    (tmp_path / "reward.py").write_text(REWARD)
    assert rlprompt("train", recipe, "-o", three, "--resume").code == 0
    assert_close_runs(one, three)


SPREAD_REWARDS = """
def reward(completions, log_extra, log_metric, **kwargs):
    values = [sum(c in "aeiou" for c in text) / 8 for text in completions]
    log_extra("letters", [len(text) for text in completions])
    log_metric("mean", sum(values) / len(values))
    return values


def beats(completions, group_index, **kwargs):
    best = {}
    for group, text in zip(group_index, completions):
        best[group] = max(len(text), best.get(group, 0))
    return [float(len(t) == best[g]) for g, t in zip(group_index, completions)]


def above_the_mean(completions, trainer_state, **kwargs):
    assert trainer_state.is_world_process_zero
    mean = sum(map(len, completions)) / len(completions)
    return [float(len(text) > mean) for text in completions]
"""


@pytest.mark.slow
def test_three_ranks_share_two_queries_and_their_rewards(tmp_path: Path, model_dir: Path) -> None:
    """Also in evaluations, where they share two queries with two completions each."""
    rewards = [
        {"path": "reward.py:reward", "name": "vowels"},
        {"path": "reward.py:beats", "weight": 0.5, "normalise": "batch"},
        {"path": "reward.py:above_the_mean", "weight": 0.2, "ranks": "first"},
    ]
    recipe = recipe_of(
        tmp_path, model_dir, training__queries_per_step=2, training__steps=2, rewards=rewards,
        evaluation__query_information=True,
    )  # fmt: skip
    (tmp_path / "reward.py").write_text(SPREAD_REWARDS)
    one, three = tmp_path / "one", tmp_path / "three"
    assert rlprompt("train", recipe, "-o", one).code == 0
    ended = run_ranks(3, tmp_path / "logs", "train", recipe, "-o", three)
    assert ended.codes == [0] * 3, ended.logs
    assert_close_runs(one, three)
    assert {row["letters"] for row in read_jsonl(three / "completions.jsonl")} != {0}


@pytest.mark.slow
def test_a_rank_that_dies_or_hangs_ends_the_others_in_time(tmp_path: Path, model_dir: Path) -> None:
    recipe = recipe_of(tmp_path, model_dir, training__steps=1000, distributed={"timeout_s": 4})
    for number, expected in ((signal.SIGKILL, "ended"), (signal.SIGSTOP, "gave no answer")):
        output, logs = tmp_path / number.name, tmp_path / f"logs_{number.name}"
        process = start_ranks(2, logs, "train", recipe, "-o", output)
        wait_for_steps(output, 2)
        victim = int((logs / "rank_1.pid").read_text())
        os.kill(victim, number)
        start = time.monotonic()
        wait_for_text(logs / "rank_0.log", "error: ")
        assert time.monotonic() - start < 4 + 10
        os.kill(victim, signal.SIGKILL)
        ended = outcome(process, logs)
        assert ended.codes == [1, -signal.SIGKILL]
        (line,) = [line for line in ended.logs[0].splitlines() if line.startswith("error: ")]
        assert "rank 0 of 2 waited" in line and expected in line and "--resume" in line
        assert load_checkpoint(output / "checkpoints").step >= 1


@pytest.mark.slow
def test_a_failing_reward_is_told_on_every_rank(tmp_path: Path, model_dir: Path) -> None:
    recipe = recipe_of(tmp_path, model_dir)
    (tmp_path / "reward.py").write_text(
        "def reward(completions, trainer_state, **kwargs):\n"
        "    first = trainer_state.is_world_process_zero\n"
        "    return [1 / first for _ in completions]\n"
    )
    ended = run_ranks(2, tmp_path / "logs", "train", recipe, "-o", tmp_path / "run")
    assert ended.codes == [2, 2]
    for log in ended.logs:
        assert "ZeroDivisionError" in log and log.count("error: ") == 1
        assert "(on rank 1 of 2)" in log


def wait_for_steps(output: Path, steps: int) -> None:
    path = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or len(read_jsonl(path)) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_text(path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in path.read_text():
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.1)


def test_one_rank_alone_meets_nobody() -> None:
    ranks = Ranks()
    assert ranks.first(lambda: 3) == 3 and ranks.each(lambda: 3, "x") == [3]
    assert ranks.agree("SIGTERM") == "SIGTERM" and ranks.largest(4) == 4
    assert ranks.share(5) == slice(0, 5)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 0.1)
    ranks.sum_gradients([weight])
    assert weight.grad.tolist() == torch.full((2,), 0.1).tolist()


@pytest.mark.parametrize(("count", "size"), [(5, 2), (3, 4), (0, 2), (8, 3)])
def test_shares_are_disjoint_whole_and_even(count: int, size: int) -> None:
    shares = [list(range(count))[Ranks(rank, size).share(count)] for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("environment", "wrong"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "ranks count from 0"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
    ],
)
def test_a_wrong_environment_is_told(
    environment: dict[str, str], wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=wrong), join_ranks(DistributedSettings()):
        pass


def test_a_disk_without_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = DistributedSettings(base="sharded", offload="nvme", nvme_path=str(tmp_path))
    with pytest.raises(InputError, match="cannot do for a base on CPUs"), join_ranks(settings):
        pass


def test_ranks_that_do_not_come_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "9")
    with (
        pytest.raises(InputError, match=r"rank 1 of 2 did not meet the others at 127\.0\.0\.1:9"),
        join_ranks(DistributedSettings(timeout_s=2)),
    ):
        pass


@pytest.mark.parametrize(
    "settings",
    [
        {"gather": "whole"},
        {"offload": "cpu"},
        {"base": "sharded", "offload": "nvme"},
        {"base": "sharded", "nvme_path": "/tmp"},
        {"timeout_s": 0},
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DistributedSettings(**settings)
    assert json.loads(DistributedSettings().model_dump_json())["base"] == "replicated"


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("n1", "tcp://n1:9"),
        ("10.0.0.1", "tcp://10.0.0.1:9"),
        ("fe80::1", "tcp://[fe80::1]:9"),
        ("[::1]", "tcp://[::1]:9"),
    ],
)
def test_ranks_meet_at_addresses_of_both_kinds(address: str, place: str) -> None:
    assert meeting_place(address, 9) == place
