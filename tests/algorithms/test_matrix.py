"""Every representation by every algorithm, through the loop that `rlprompt train` runs.

Two steps on a toy whose optimum is known: the prompt comes closer to it, all numbers are finite,
and nothing that is frozen changes. How close is computed exactly, not sampled:

- with rewards: the probability that a completion starts with one of the first 60 tokens, which is
  all that is rewarded; at best 1;
- supervised: the log-probability of the targets; at best 0;
- pairs: the log-ratio of chosen to rejected; no bound;
- distillation: minus KL(teacher || prompt) of the first token; at best 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprompt.algorithms.make import ALGORITHMS
from rlprompt.evaluation.measures import logprobs_by_query
from rlprompt.files import read_jsonl
from rlprompt.kernels.lm_head import head_logits
from rlprompt.model.base import verify_unchanged
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.layer_adapters import METHODS
from rlprompt.prompts.make import PROMPTS
from rlprompt.prompts.sequence import SequencePrompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.recipe.build import build_run
from rlprompt.recipe.schema import Recipe
from rlprompt.rollout.sources import given_completion
from rlprompt.runs.run import Run
from rlprompt.types import Group, Query
from tests.fixtures.algorithms import CASES
from tests.fixtures.prompts import KINDS
from tests.fixtures.runs import QUERIES, completion, tiny_recipe

FIRST = 60
REWARD = f"""
def first_low(completion_ids, **kwargs):
    return [float(ids[0] < {FIRST}) for ids in completion_ids]
"""
ANSWERS = {"completion": "the sun", "chosen": "the rain and the sun", "rejected": "one line"}
TRAINED = (
    "soft", "prefix", "prefix_low_rank", "lora", "ia3", "text_then_soft", "soft_then_prefix",
)  # fmt: skip


def first_token_logprobs(policy: Policy, asked: list[Query], prompt: Prompt) -> Tensor:
    """[queries, V]."""
    prefix = policy.prefix(prompt)
    states = policy.hidden_scored(asked, [[completion(5)] for _ in asked], prefix, prompt)
    return head_logits(states.detach(), policy.forward.head).log_softmax(1)


def rewarded(policy: Policy, asked: list[Query]) -> float:
    return float(first_token_logprobs(policy, asked, policy.prompt).exp()[:, :FIRST].sum(1).mean())


def column_logprob(policy: Policy, asked: list[Query], column: str) -> float:
    answers = [Group(query, (given_completion(policy, query, column),)) for query in asked]
    return logprobs_by_query(policy, policy.prompt, answers, 4096).mean


def near_teacher(policy: Policy, asked: list[Query]) -> float:
    teacher = first_token_logprobs(policy, asked, TextPrompt("Be nice."))
    student = first_token_logprobs(policy, asked, policy.prompt)
    return -float((teacher.exp() * (teacher - student)).sum(1).mean())


OBJECTIVES: dict[str, Callable[[Policy, list[Query]], float]] = {
    **dict.fromkeys(("grpo", "rloo", "reinforce", "ppo"), rewarded),
    "supervised": lambda policy, asked: column_logprob(policy, asked, "completion"),
    "dpo": lambda policy, asked: (
        column_logprob(policy, asked, "chosen") - column_logprob(policy, asked, "rejected")
    ),
    "distill": near_teacher,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and reward, written once."""
    path = tmp_path_factory.mktemp("matrix")
    tiny_recipe(path)
    (path / "first.py").write_text(REWARD)
    return path


def run_of(folder: Path, output: Path, algorithm: str, prompt: str) -> Run:
    """Two steps over four queries, each with enough completions for a clear gradient."""
    plain = tiny_recipe(
        folder,
        data={"rows": [{"query": text, **ANSWERS} for text in QUERIES[:4]], "heldout": 0},
        rewards=[{"path": "first.py:first_low"}],
        training={"steps": 2, "queries_per_step": 4, "save_every": 2},
        sampling={"max_tokens": 2},
    ).plain()
    settings = dict(CASES[algorithm])
    if settings["type"] in ("grpo", "rloo", "reinforce", "ppo"):
        settings["group_size"] = 24
    recipe = Recipe(**{**plain, "algorithm": settings, "prompt": KINDS[prompt]})
    built = build_run(recipe, folder, output)
    assert isinstance(built, Run)
    return built


def frozen_parts(prompt: Prompt) -> list[dict[str, Tensor]]:
    if not isinstance(prompt, SequencePrompt):
        return []
    return [part.state_dict() for part in prompt.parts if part is not prompt.trained]


def test_every_representation_and_every_algorithm_is_in_the_matrix() -> None:
    assert set(OBJECTIVES) == {case["type"] for case in CASES.values()} == set(ALGORITHMS)
    kinds = [KINDS[name] for name in TRAINED]
    assert {kind["type"] for kind in kinds} == set(PROMPTS) - {"text"}  # it has nothing to train
    methods = {kind["method"]["type"] for kind in kinds if kind["type"] == "adapter"}
    assert methods == {name.lower() for name in METHODS}
    ranks = {kind.get("rank") is None for kind in kinds if kind["type"] == "prefix"}
    assert ranks == {True, False}


@pytest.mark.parametrize("prompt", TRAINED)
@pytest.mark.parametrize("algorithm", CASES)
def test_two_steps_come_closer_to_the_optimum(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, prompt: str
) -> None:
    # Drawing the report's charts takes longer than everything else together.
    monkeypatch.setattr("rlprompt.recipe.build.write_report", lambda *_: None)
    run = run_of(folder, tmp_path, algorithm, prompt)
    policy, asked = run.parts.policy, list(run.parts.data.train)
    objective = OBJECTIVES[CASES[algorithm]["type"]]
    start = objective(policy, asked)
    before = [p.detach().clone() for p in policy.parameters()]
    frozen = frozen_parts(policy.prompt)

    summary = run.run()

    assert (summary["steps"], summary["stopped_because"]) == (2, "finished")
    assert objective(policy, asked) > start
    assert not any(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    fingerprint = policy.base.fingerprint
    assert summary["base_fingerprint_before"] == summary["base_fingerprint_after"] == fingerprint
    assert verify_unchanged(policy.base) == fingerprint
    assert all(p.grad is None for p in policy.base.model.parameters())
    for was, now in zip(frozen, frozen_parts(policy.prompt), strict=True):
        assert all(torch.equal(was[name], now[name]) for name in was)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    numbers: list[Any] = [value for row in rows for value in row.values()]
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in numbers)
