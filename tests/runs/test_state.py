"""The state of a run: what it remembers, and that a checkpoint holds all of it."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprompt.data.sampler import QuerySampler
from rlprompt.errors import InputError
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from rlprompt.runs.learner import LearnerState, StepResult, named_under
from rlprompt.runs.state import RunState
from rlprompt.training.optimizer import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from rlprompt.training.settings import OptimizerSettings

IDENTITY = {"dataset": "d1", "base": "b1"}


class Drifting:
    """A learner that follows random gradients, over queries that it draws and leaves unanswered."""

    def __init__(self, tokens: int) -> None:
        self.prompt = SoftPrompt(torch.ones(tokens, 3))
        self.optimizer = build_optimizer(self.prompt.parameters(), OptimizerSettings(), 0.1)
        self.sampler = QuerySampler(5, 2, seed=0)
        self.is_over = False
        self.tried: list[dict[str, Any]] = []

    def step(
        self, step: int, seed: int, *, next_seed: int | None = None, time_share: float = 0.0
    ) -> StepResult:
        (parameter,) = self.prompt.parameters()
        parameter.grad = torch.rand_like(parameter)
        self.optimizer.step()
        self.sampler.next()
        return StepResult({}, [], 0, 0.0)

    def prompt_state(self) -> LearnerState:
        return LearnerState(self.prompt.state_dict(), {})

    def restored_prompt(self, state: LearnerState) -> Prompt:
        prompt = self.prompt.copy()
        prompt.load_state_dict(dict(state.tensors))
        return prompt

    def state(self) -> LearnerState:
        tensors = optimizer_tensors(self.optimizer, "optimizer")
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        own |= {f"prompt/{name}": tensor for name, tensor in self.prompt.state_dict().items()}
        return LearnerState(own, {"source": self.sampler.state_dict()})

    def restore(self, state: LearnerState) -> None:
        self.prompt.load_state_dict(named_under(state.tensors, "prompt"))
        load_optimizer_tensors(self.optimizer, state.tensors, "optimizer")
        self.sampler.load_state_dict(state.plain["source"])

    def close(self) -> None:
        """Nothing runs."""


def fresh(tokens: int = 2) -> RunState:
    return RunState(Drifting(tokens))


def advance(state: RunState) -> None:
    state.learner.step(state.progress.step, 0)
    state.progress.step += 1
    state.progress.step_seconds.append(0.5)


def snapshot(state: RunState) -> dict[str, object]:
    return {
        "prompt": state.learner.prompt.state_dict()["embeddings"].tolist(),
        "best": state.best.tensors["embeddings"].tolist(),
        "progress": copy.deepcopy(state.progress),
        "next": copy.deepcopy(state.learner.state().plain),
        "optimizer": {
            name: value.tolist() for name, value in state.learner.state().tensors.items()
        },
    }


def test_a_restored_state_goes_on_like_the_one_that_was_saved(tmp_path: Path) -> None:
    state = fresh()
    for _ in range(3):
        advance(state)
    state.remember_best(0.5, {"reward": 0.5})
    advance(state)
    save_checkpoint(tmp_path, state.checkpoint(IDENTITY), 1)
    expected = snapshot(state)
    for _ in range(2):
        advance(state)
    drawn = random.random()

    resumed = fresh()
    resumed.restore(load_checkpoint(tmp_path), IDENTITY)
    assert snapshot(resumed) == expected
    assert resumed.progress.best_step == 3 and resumed.progress.heldout["learned"] == {
        "reward": 0.5
    }
    for _ in range(2):
        advance(resumed)  # draws its gradients from the restored generator
    assert snapshot(resumed) == snapshot(state)
    assert random.random() == drawn


def test_a_checkpoint_in_memory_does_not_follow_the_run() -> None:
    state = fresh()
    advance(state)
    kept = state.checkpoint(IDENTITY)
    expected = snapshot(state) | {"progress": None}
    advance(state)
    state.restore(kept, IDENTITY)
    advance(state)
    state.restore(kept, IDENTITY)  # not even after it was restored once
    assert snapshot(state) | {"progress": None} == expected
    assert state.progress.step == 1 and state.progress.step_seconds == [0.5]


def test_a_checkpoint_from_before_searches_goes_on() -> None:
    """Its best prompt is tensors alone, which is all that a gradient step needs."""
    state = fresh()
    advance(state)
    state.remember_best(0.5, {"reward": 0.5})
    advance(state)
    kept = state.checkpoint(IDENTITY)
    older = {name: value for name, value in kept.state.items() if name != "best"}
    resumed = fresh()
    resumed.restore(Checkpoint(kept.step, kept.tensors, older), IDENTITY)
    assert snapshot(resumed) == snapshot(state)
    best = resumed.best_prompt().state_dict()["embeddings"]
    assert torch.equal(best, kept.tensors["best/embeddings"])


def test_the_best_is_kept_and_what_follows_is_stale() -> None:
    state = fresh()
    rewards = [0.1, 0.3, 0.3, 0.2]
    kept = []
    for reward in rewards:
        kept.append(state.remember_best(reward, {"reward": reward}))
        advance(state)
    assert kept == [True, True, False, False]
    assert (state.progress.best_reward, state.progress.best_step) == (0.3, 1)
    assert state.progress.stale_evaluations == 2
    assert not torch.equal(
        state.best.tensors["embeddings"], state.learner.prompt.state_dict()["embeddings"]
    )


def test_an_evaluation_without_scores_is_never_the_best() -> None:
    state = fresh()
    assert not state.remember_best(math.nan, {})
    assert state.progress.best_reward is None and state.progress.stale_evaluations == 1
    assert state.remember_best(-5.0, {})
    assert not state.remember_best(math.nan, {})
    assert state.progress.best_reward == -5.0


@pytest.mark.parametrize("changed", ["dataset", "base"])
def test_a_checkpoint_of_other_data_or_another_base_is_refused(changed: str) -> None:
    kept = fresh().checkpoint(IDENTITY)
    with pytest.raises(InputError, match=f"the {changed} has changed since the checkpoint"):
        fresh().restore(kept, IDENTITY | {changed: "other"})


def test_a_checkpoint_of_another_prompt_is_refused() -> None:
    with pytest.raises(InputError, match=r"holds another prompt, .*start a new run"):
        fresh(tokens=4).restore(fresh().checkpoint(IDENTITY), IDENTITY)
