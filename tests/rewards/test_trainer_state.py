"""The state that rewards see: the fields of TRL's, with what the run will do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState as TheirState

from rlprompt.rewards import LoadedReward, RewardRunner, RewardSettings
from rlprompt.rewards.base import RunPlan, TrainerState
from rlprompt.types import Group
from tests.fixtures.runs import completion, queries, tiny_trainer
from tests.fixtures.searches import search_run

REWARD = """
import dataclasses, json

def reward(completions, trainer_state, **kwargs):
    with open(NOTE, "a") as handle:
        handle.write(json.dumps(dataclasses.asdict(trainer_state)) + "\\n")
    trainer_state.mine = 1
    trainer_state.log_history.append({"x": 1.0})
    share = trainer_state.global_step / trainer_state.max_steps
    return [share * len(completion) for completion in completions]
"""


def test_it_has_every_field_of_the_state_that_trl_hands_on() -> None:
    ours, theirs = (
        {field.name for field in dataclasses.fields(kind)} for kind in (TrainerState, TheirState)
    )
    assert theirs <= ours
    fresh, reference = TrainerState(global_step=0), TheirState()
    for name in theirs:
        expected = getattr(reference, name)
        if name in ("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps"):
            assert isinstance(getattr(fresh, name), int)
        else:
            assert getattr(fresh, name) == expected or not (getattr(fresh, name) or expected)


def test_a_plan_tells_where_the_run_is() -> None:
    plan = RunPlan(
        steps=30,
        num_queries=12,
        queries_per_step=4,
        completions_per_step=32,
        eval_steps=5,
        save_steps=10,
    )
    state = plan.at(9)
    assert (state.global_step, state.max_steps) == (9, 30)
    assert state.epoch == pytest.approx(3.0)
    assert state.num_train_epochs == 10
    assert (state.train_batch_size, state.eval_steps, state.save_steps) == (32, 5, 10)


@pytest.mark.parametrize("isolated", [False, True], ids=["in the run", "isolated"])
def test_a_run_fills_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolated: bool) -> None:
    monkeypatch.setattr("rlprompt.recipe.build.write_report", lambda folder: None)
    note = tmp_path / "states"
    (tmp_path / "states.py").write_text(f"NOTE = {str(note)!r}\n" + REWARD)
    entry: dict[str, Any] = {"path": "states.py:reward", "name": "letters"}
    entry |= {"isolation": {}} if isolated else {}
    run = tiny_trainer(tmp_path, tmp_path / "run", rewards=[entry])
    run.run()
    states = [json.loads(line) for line in note.read_text().splitlines()]
    assert {state["global_step"] for state in states} == {0, 1, 2, 3}
    assert {state["max_steps"] for state in states} == {3}
    assert {state["train_batch_size"] for state in states} == {4}
    assert all(state["log_history"] == [] for state in states)
    train = len(run.parts.data.train)
    assert {state["epoch"] for state in states} == {step / train for step in range(4)}


def test_a_search_fills_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlprompt.recipe.build.write_report", lambda folder: None)
    note = tmp_path / "states"
    (tmp_path / "states.py").write_text(f"NOTE = {str(note)!r}\n" + REWARD)
    entry = {"path": "states.py:reward", "name": "letters"}
    search_run(tmp_path, tmp_path / "run", rewards=[entry], training={"steps": 2}).run()
    states = [json.loads(line) for line in note.read_text().splitlines()]
    assert {state["max_steps"] for state in states} == {2}


def test_rewards_get_a_state_of_their_own_and_outside_a_run_one_that_divides() -> None:
    seen: list[TrainerState] = []

    def reward(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
        seen.append(trainer_state)
        assert trainer_state.log_history == []
        trainer_state.log_history.append({"x": 1.0})
        trainer_state.global_step = 99
        return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

    settings = [RewardSettings(path="x:y", name=name) for name in "ab"]
    runner = RewardRunner([LoadedReward(each, reward) for each in settings])
    for step in (0, 5):
        runner.score([Group(queries(1)[0], (completion(1),))], step=step)
    assert len({id(state) for state in seen}) == 4
    assert [state.max_steps for state in seen] == [1, 1, 5, 5]
