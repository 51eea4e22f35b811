"""What holds for every algorithm of a recipe, found in the one list of them.

An algorithm that joins `ALGORITHMS` must be given settings in `tests.fixtures.algorithms`, or the
first test fails.
"""

from __future__ import annotations

import math
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from rich.console import Console

from rlprompt.algorithms.make import ALGORITHMS, AnyAlgorithmSettings
from rlprompt.files import read_jsonl
from rlprompt.prompts.soft import SoftSettings
from rlprompt.recipe.build import build_single_run
from rlprompt.recipe.schema import Recipe
from rlprompt.runs.run import Run
from rlprompt.tracking.names import is_taken
from tests.fixtures.algorithms import (
    CASES,
    algorithm_of,
    batch_for,
    gradients,
    learn,
    settings_of,
)
from tests.fixtures.prompts import make
from tests.fixtures.runs import QUERIES, gradient_step, tiny_policy, tiny_recipe

FREE = SoftSettings(num_virtual_tokens=6, max_norm_ratio=None)
ANSWERS = {"completion": "the sun", "chosen": "the rain and the sun", "rejected": "one line"}


def test_every_algorithm_is_tested_here() -> None:
    assert {case["type"] for case in CASES.values()} == set(ALGORITHMS)


@pytest.mark.parametrize("name", CASES)
def test_settings_survive_being_written_and_read(name: str) -> None:
    settings = settings_of(name)
    adapter: TypeAdapter[Any] = TypeAdapter(AnyAlgorithmSettings)
    assert adapter.validate_python(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_no_gradient_and_no_number(name: str) -> None:
    """In fp64: all in one micro-batch, or cut as small as the algorithm allows."""
    policy = tiny_policy(dtype=torch.float64)
    batch = batch_for(algorithm_of(name, policy), policy)
    seen = []
    for budget in (100_000, 64):
        algorithm = algorithm_of(name, policy, num_epochs=2)
        metrics = learn(policy, algorithm, batch, budget)
        seen.append((metrics, gradients(policy, algorithm)))
    (whole, grads), (cut, cut_grads) = seen
    assert float(grads[0].norm()) > 1e-6
    for one, other in zip(grads, cut_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert cut == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name != "cispo"])
def test_the_gradient_is_that_of_the_loss(name: str) -> None:
    """A small step lowers the loss on the same batch by what the gradient promises.

    CISPO has no such loss: its weights change with the policy, and carry no gradient.
    """
    policy = tiny_policy(dtype=torch.float64, prompt=FREE)
    batch = batch_for(algorithm_of(name, policy), policy)
    once = {"num_epochs": 2, "num_minibatches": 1}
    algorithm = algorithm_of(name, policy, **once)
    start = learn(policy, algorithm, batch, 100_000)["loss"]
    square = sum(float(grad.square().sum()) for grad in gradients(policy, algorithm))
    rate = 1e-4 / square**0.5
    # The mean of two losses: that before the step, which is `start`, and that after it.
    moved = learn(policy, algorithm_of(name, policy, **once), batch, 100_000, lr=rate)["loss"]
    assert 2 * (moved - start) == pytest.approx(-rate * square, rel=0.02)


@pytest.mark.parametrize("kind", ["prefix", "lora", "ia3", "soft_then_prefix"])  # soft: above
@pytest.mark.parametrize("name", [name for name in CASES if name != "cispo"])
def test_every_representation_learns_by_every_algorithm(name: str, kind: str) -> None:
    """Two steps down the gradient: the second begins where the loss is lower."""
    policy = tiny_policy(dtype=torch.float64)
    policy.prompt = make(kind, policy)
    batch = batch_for(algorithm_of(name, policy), policy)
    once = {"num_epochs": 2, "num_minibatches": 1}
    algorithm = algorithm_of(name, policy, **once)
    start = learn(policy, algorithm, batch, 100_000)["loss"]
    square = sum(float(grad.square().sum()) for grad in gradients(policy, algorithm))
    assert square > 0
    moved = learn(
        policy, algorithm_of(name, policy, **once), batch, 100_000, lr=1e-3 / square**0.5
    )["loss"]
    assert moved < start - 0.2e-3 * square**0.5


def trainer(folder: Path, output: Path, name: str) -> Run:
    """A run of two steps with a checkpoint after each."""
    plain = tiny_recipe(
        folder,
        data={"rows": [{"query": text, **ANSWERS} for text in QUERIES]},
        training={"steps": 2, "queries_per_step": 4, "save_every": 1},
        sampling={"max_tokens": 3},
        evaluation={"every": 2, "completions_per_query": 1},
    ).plain()
    recipe = Recipe(**{**plain, "algorithm": CASES[name]})
    return build_single_run(recipe, folder, output, Console(file=StringIO()))


@pytest.mark.parametrize("name", CASES)
def test_a_run_trains_and_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # Drawing the report's charts takes longer than everything else together.
    monkeypatch.setattr("rlprompt.recipe.build.write_report", lambda *_: None)
    whole = trainer(tmp_path, tmp_path / "whole", name)
    before = [p.detach().clone() for p in whole.parts.policy.parameters()]
    whole.run()
    after = list(whole.parts.policy.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert [math.isfinite(row["loss"]) for row in rows] == [True, True]
    # No reward may log under a name of the run's: it is in the list, or logged in every step.
    assert [n for n in rows[-1] if not (is_taken(n) or all(n in row for row in rows))] == []

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(sorted((tmp_path / "again" / "checkpoints").iterdir())[-1])
    again = trainer(tmp_path, tmp_path / "again", name)
    again.run(resume=True)
    assert again.state.progress.step == 2
    for one, other in zip(after, again.parts.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    mine, theirs = (gradient_step(t).parts.algorithm.state_dict() for t in (whole, again))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
