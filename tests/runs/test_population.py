"""A population: each member is the run that it would be alone, and the best one's prompt wins."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from rlprompt.artifacts.format import read_artifact_info
from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.recipe.build import build_run, build_single_run
from rlprompt.recipe.schema import Recipe
from rlprompt.runs.learner import NotFiniteError
from rlprompt.runs.population import Population
from rlprompt.runs.summary import Summary
from tests.fixtures.runs import comparable_rows, gradient_step, stops, tiny_recipe

MEMBERS: list[dict[str, Any]] = [
    {"name": "soft", "changes": {"training.optimizer.lr_relative": 0.2}},
    {
        "name": "lora",
        "changes": {"prompt": {"type": "adapter", "text": "the sun", "method": {"type": "lora"}}},
    },
]


def population(folder: Path, output: Path, **changes: Any) -> Population:
    plain = {"population": MEMBERS, "training": {"steps": 4}, "evaluation": {"every": 1}}
    built = build_run(tiny_recipe(folder, **{**plain, **changes}), folder, output)
    assert isinstance(built, Population)
    return built


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """A finished population: the folder of its model, with the run in `run`."""
    folder = tmp_path_factory.mktemp("population")
    return folder, population(folder, folder / "run").run()


def test_members_share_one_base_and_nothing_that_learns(tmp_path: Path) -> None:
    first, second = population(tmp_path, tmp_path / "run").members.values()
    assert first.parts.policy is not second.parts.policy
    assert first.parts.policy.base is second.parts.policy.base
    assert first.parts.policy.forward is second.parts.policy.forward
    assert first.parts.evaluator is second.parts.evaluator
    assert gradient_step(first).parts.rewards is not gradient_step(second).parts.rewards
    assert not {id(p) for p in first.parts.policy.parameters()} & {
        id(p) for p in second.parts.policy.parameters()
    }


@pytest.mark.parametrize("member", ["soft", "lora"])
def test_a_member_is_the_run_that_it_would_be_alone(
    done: tuple[Path, Summary], member: str, tmp_path: Path
) -> None:
    folder, _ = done
    recipe = tiny_recipe(
        folder, population=MEMBERS, training={"steps": 4}, evaluation={"every": 1}
    ).members()[member]
    assert recipe.training.steps == 2
    build_single_run(recipe, folder, tmp_path).run()
    for kind in ("metrics", "evaluation", "completions"):
        ours = comparable_rows(folder / "run" / "members" / member, kind)
        assert ours == comparable_rows(tmp_path, kind)


def test_the_best_members_artifact_is_the_runs(done: tuple[Path, Summary]) -> None:
    folder, summary = done
    run = folder / "run"
    rewards = {name: row["heldout_reward_after"] for name, row in summary["members"].items()}
    assert list(rewards) == ["soft", "lora"]
    best = max(rewards, key=rewards.__getitem__)
    assert summary["best_member"] == best
    assert summary["heldout_reward_after"] == rewards[best]
    assert summary["steps"] == 4 and summary["stopped_because"] == "finished"
    theirs = run / "members" / best / "artifact"
    assert read_artifact_info(run / "artifact") == read_artifact_info(theirs)
    own, expected = (load_file(path / "prompt.safetensors") for path in (run / "artifact", theirs))
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)
    assert json.loads((run / "summary.json").read_text())["members"].keys() == rewards.keys()
    assert (run / "report.html").read_text() == (theirs.parent / "report.html").read_text()


def test_baselines_are_the_same_and_were_drawn_once(done: tuple[Path, Summary]) -> None:
    folder, _ = done
    rows = [
        list(read_jsonl(folder / "run" / "members" / name / "evaluation.jsonl"))
        for name in ("soft", "lora")
    ]
    base = [[r for r in part if r["who"] == "base"] for part in rows]
    assert len(base[0]) == 1
    assert {k: v for k, v in base[0][0].items() if k != "time"} == {
        k: v for k, v in base[1][0].items() if k != "time"
    }


def test_a_resumed_population_runs_what_is_left(done: tuple[Path, Summary], tmp_path: Path) -> None:
    folder, whole = done
    cut = population(folder, tmp_path)
    next(iter(cut.members.values())).run()  # the process dies after the first member
    first = tmp_path / "members" / "soft" / "metrics.jsonl"
    written = first.read_bytes()
    resumed = population(folder, tmp_path).run(resume=True)
    assert first.read_bytes() == written  # it was not run again
    rewards = [row["heldout_reward_after"] for row in resumed["members"].values()]
    assert rewards == [row["heldout_reward_after"] for row in whole["members"].values()]
    for kind in ("metrics", "completions"):
        ours = comparable_rows(tmp_path / "members" / "lora", kind)
        assert ours == comparable_rows(folder / "run" / "members" / "lora", kind)


def test_a_member_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = population(tmp_path, tmp_path / "run")

    def explode(*args: object, **kwargs: object) -> None:
        raise NotFiniteError("the loss is not finite")

    soft, lora = built.members.values()
    monkeypatch.setattr(gradient_step(soft).updater, "learn", explode)
    summary = built.run()
    assert summary["best_member"] == "lora"
    assert summary["members"]["soft"] == {
        "stopped_because": "failed",
        "error": "the loss is not finite",
    }
    monkeypatch.setattr(gradient_step(lora).updater, "learn", explode)
    other = population(tmp_path, tmp_path / "other")
    for trainer in other.members.values():
        monkeypatch.setattr(gradient_step(trainer).updater, "learn", explode)
    with pytest.raises(NotFiniteError, match="no member came to an end"):
        other.run()


def ends_member(name: str, **limit: Any) -> dict[str, Any]:
    """Changes of a recipe by which a guard ends the members whose completions are long enough."""
    guard = {"type": "limit", "name": name, "metric": "completions/mean_length", **limit}
    return {"guards": [guard | {"window": 2, "patience": 1, "action": "stop"}]}


LONG: dict[str, Any] = {"training": {"steps": 8}, "evaluation": {"every": 1}}


def test_a_guard_ends_its_member_and_the_others_are_trained(tmp_path: Path) -> None:
    guard = ends_member("any_length", above=0.0)
    summary = population(tmp_path, tmp_path / "run", **LONG, **guard).run()
    ended = {
        name: (row["stopped_because"], row["steps"]) for name, row in summary["members"].items()
    }
    assert ended == {"soft": ("guard:any_length", 2), "lora": ("guard:any_length", 2)}
    assert summary["stopped_because"] == "finished"
    assert [alarm["member"] for alarm in summary["alarms"]] == ["soft", "lora"]
    logs = [tmp_path / "run" / "members" / name / "metrics.jsonl" for name in ended]
    written = [log.read_bytes() for log in logs]
    again = population(tmp_path, tmp_path / "run", **LONG, **guard)
    assert again.run(resume=True)["members"] == summary["members"]
    assert [log.read_bytes() for log in logs] == written  # none ran again


def test_resuming_goes_on_with_the_member_that_a_signal_stopped(tmp_path: Path) -> None:
    """One member was ended by a guard, the next one by a signal: only that one has steps left."""
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    whole = population(tmp_path, straight, **LONG, **stops(99, "SIGTERM")).run()
    first = population(tmp_path, cut, **LONG, **stops(99, "SIGTERM"))
    soft, lora = first.members.values()
    soft.run()
    step = gradient_step(lora).step

    def stopped(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    gradient_step(lora).step = stopped  # type: ignore[method-assign]
    summary = first.run(resume=True)
    assert summary["stopped_because"] == "SIGTERM"
    assert summary["members"]["soft"]["stopped_because"] == "finished"
    assert summary["members"]["lora"]["stopped_because"] == "SIGTERM"
    resumed = population(tmp_path, cut, **LONG, **stops(99, "SIGTERM")).run(resume=True)
    assert resumed["stopped_because"] == "finished"
    for key in ("heldout_reward_after", "best_step", "steps", "stopped_because"):
        for name, row in whole["members"].items():
            assert resumed["members"][name][key] == row[key]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"training": {"steps": 3}}, "which 2 members of population cannot share evenly"),
        ({"population": [MEMBERS[0], MEMBERS[0]]}, "have the same name"),
        ({"population": [{"name": "a/b"}]}, "name"),
        ({"population": [{"name": "a", "changes": {"sampling.top_p": 0.9}}]}, "not sampling.top_p"),
        ({"population": [{"name": "a", "changes": {"prompt.len": 3}}]}, "member a: unknown key"),
        ({"population": [{"name": "a", "changes": {"seed.x": 3}}]}, "not seed.x"),
    ],
)
def test_what_cannot_be_a_population(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValidationError, match=sentence):
        tiny_recipe(tmp_path, **{"training": {"steps": 4}, "population": MEMBERS, **changes})


def test_the_best_needs_held_out_queries(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="population needs held-out queries"):
        population(tmp_path, tmp_path / "run", data={"heldout": 0})


def test_a_recipe_without_population_has_no_members(tmp_path: Path) -> None:
    assert tiny_recipe(tmp_path).members() == {}
    recipe = tiny_recipe(tmp_path, population=MEMBERS, training={"steps": 4})
    assert Recipe.model_validate(recipe.plain()) == recipe
