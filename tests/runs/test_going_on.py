"""A run that had ended goes on; a signal leaves evaluations at once; what is shown meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlprompt.artifacts.format import read_artifact_info
from rlprompt.errors import InputError
from rlprompt.evaluation.heldout import HeldoutResult
from rlprompt.files import read_jsonl
from rlprompt.prompts.base import Prompt
from rlprompt.recipe.build import build_run
from rlprompt.recipe.stored import check_folder, claim_folder
from rlprompt.runs.population import Population
from rlprompt.runs.run import Run
from rlprompt.runs.summary import Summary
from tests.fixtures.runs import assert_same_run, comparable_rows, tiny_recipe, tiny_trainer

QUICK: dict[str, Any] = {"training": {"steps": 3, "save_every": 1}, "evaluation": {"every": 1}}


@pytest.fixture(autouse=True)
def _report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing costs more than a tiny run."""
    if "report" not in request.node.name:
        monkeypatch.setattr("rlprompt.recipe.build.write_report", lambda folder: None)


def scripted(*heldout: float) -> dict[str, Any]:
    options = {"heldout": list(heldout)}
    return {"rewards": [{"path": "rewards.py:Scripted", "name": "scripted", "options": options}]}


def go_on(folder: Path, output: Path, **changes: Any) -> Summary:
    """What `rlprompt train --resume` does, with the checks that come first."""
    recipe = tiny_recipe(folder, **changes)
    check_folder(output, recipe, folder, True)
    built = build_run(recipe, folder, output)
    with claim_folder(output, recipe, folder, True) as begun:
        return built.run(resume=begun)


def begin(folder: Path, output: Path, **changes: Any) -> Summary:
    recipe = tiny_recipe(folder, **changes)
    built = build_run(recipe, folder, output)
    with claim_folder(output, recipe, folder, False) as begun:
        return built.run(resume=begun)


def steps_of(output: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(output / "metrics.jsonl")]


WORSE = scripted(0.9, *[0.1] * 20)


@pytest.mark.parametrize("changed", [{"early_stopping": None}, {"steps": 12}])
def test_a_run_that_early_stopping_ended_goes_on(tmp_path: Path, changed: dict[str, Any]) -> None:
    output = tmp_path / "run"
    plain = {"steps": 8, "save_every": 1, "early_stopping": 2}
    first = begin(tmp_path, output, **WORSE, training=plain, evaluation={"every": 1})
    assert (first["stopped_because"], first["steps"]) == ("early_stopping", 2)
    again = go_on(tmp_path, output, **WORSE, training=plain, evaluation={"every": 1})
    assert (again["stopped_because"], again["steps"]) == ("early_stopping", 2)
    more = {**plain, **changed}
    summary = go_on(tmp_path, output, **WORSE, training=more, evaluation={"every": 1})
    expected = ("finished", 8) if "early_stopping" in changed else ("early_stopping", 4)
    assert (summary["stopped_because"], summary["steps"]) == expected
    assert steps_of(output) == list(range(1, expected[1] + 1))
    assert summary["best_step"] == 0


def guard(**changes: Any) -> dict[str, Any]:
    rule = {"type": "limit", "name": "long", "metric": "completions/mean_length", "above": 0.0}
    return {"guards": [{**rule, "window": 2, "patience": 1, "action": "stop", **changes}]}


@pytest.mark.parametrize("changes", [guard(action="warn"), guard(above=1e9), {"guards": []}])
def test_a_run_that_a_guard_ended_goes_on_when_the_guard_is_another(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    output = tmp_path / "run"
    first = begin(tmp_path, output, **QUICK, **guard())
    assert (first["stopped_because"], first["steps"]) == ("guard:long", 2)
    assert go_on(tmp_path, output, **QUICK, **guard())["steps"] == 2
    with pytest.raises(InputError, match=r"guard 'long' has ended.*guards\.0\.action=warn"):
        go_on(tmp_path, output, **{**QUICK, "training": {"steps": 9, "save_every": 1}}, **guard())
    summary = go_on(tmp_path, output, **QUICK, **changes)
    assert (summary["stopped_because"], summary["steps"]) == ("finished", 3)
    assert summary["alarms"][0]["guard"] == "long" and not summary["alarms"][0]["stop"]


def test_a_run_whose_time_was_over_goes_on_with_more(tmp_path: Path) -> None:
    output = tmp_path / "run"
    short = {"steps": 4, "save_every": 1, "max_seconds": 1e-6}
    first = begin(tmp_path, output, training=short)
    assert (first["stopped_because"], first["steps"]) == ("max_seconds", 1)
    with pytest.raises(InputError, match=r"has spent its training\.max_seconds"):
        go_on(tmp_path, output, training={**short, "steps": 6})
    summary = go_on(tmp_path, output, training={**short, "max_seconds": None})
    assert (summary["stopped_because"], summary["steps"]) == ("finished", 4)


def test_a_refused_change_is_not_remembered(tmp_path: Path) -> None:
    output = tmp_path / "run"
    begin(tmp_path, output, **QUICK, **guard())
    before = (output / "recipe.resolved.yaml").read_bytes()
    with pytest.raises(InputError):
        go_on(tmp_path, output, **{**QUICK, "training": {"steps": 9}}, **guard())
    assert (output / "recipe.resolved.yaml").read_bytes() == before


def test_a_run_that_ends_sooner_evaluates_its_last_step(tmp_path: Path) -> None:
    output = tmp_path / "run"
    plain = {"save_every": 1, "steps": 9}
    run = tiny_trainer(tmp_path, output, training=plain, evaluation={"every": 5})
    stop_at(run, 2)
    assert run.run()["steps"] == 2
    summary = tiny_trainer(
        tmp_path, output, training={**plain, "steps": 2}, evaluation={"every": 5}
    ).run(resume=True)
    assert (summary["stopped_because"], summary["steps"]) == ("finished", 2)
    assert [row["step"] for row in read_jsonl(output / "evaluation.jsonl")] == [0, 0, 2]


def stop_at(run: Run, step: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal at the end of a step."""
    learn = run.parts.learner.step

    def stopped(done: int, *args: Any, **kwargs: Any) -> Any:
        result = learn(done, *args, **kwargs)
        if done + 1 == step:
            os.kill(os.getpid(), number)
        return result

    run.parts.learner.step = stopped  # type: ignore[method-assign, assignment]


def stop_in_evaluation(run: Run, when: Callable[[Prompt, int], bool], times: int = 1) -> list[str]:
    """Send Ctrl-C from within an evaluation; returns what ran on after it."""
    went_on: list[str] = []
    evaluator = run.parts.evaluator
    evaluate = evaluator._evaluate

    def stopped(prompt: Prompt, step: int, progress: Any) -> HeldoutResult:
        if when(prompt, step):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            went_on.append(prompt.kind)
        return evaluate(prompt, step, progress)

    evaluator._evaluate = stopped  # type: ignore[method-assign]
    return went_on


SIX = {
    "training": {"steps": 6, "save_every": 2},
    "algorithm": {"num_epochs": 2},
    "evaluation": {"every": 2, "handwritten": "Use many vowels."},
}


@pytest.mark.parametrize(
    ("kind", "step"), [("none", 0), ("text", 0), ("soft", 0), ("soft", 4), ("soft", 6)]
)
def test_ctrl_c_leaves_an_evaluation_at_once_and_nothing_is_lost(
    tmp_path: Path, kind: str, step: int
) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    tiny_trainer(tmp_path, straight, **SIX).run()
    first = tiny_trainer(tmp_path, cut, **SIX)
    went_on = stop_in_evaluation(first, lambda p, s: p.kind == kind and s == step)
    summary = first.run()
    assert went_on == []
    assert (summary["stopped_because"], summary["steps"]) == ("SIGINT", step)
    assert (cut / "artifact" / "prompt.json").is_file()
    done = [(row["step"], row["who"]) for row in read_jsonl(cut / "evaluation.jsonl")]
    assert (step, {"none": "base", "text": "handwritten", "soft": "learned"}[kind]) not in done
    tiny_trainer(tmp_path, cut, **SIX).run(resume=True)
    assert_same_run(straight, cut)


def test_a_second_ctrl_c_ends_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    tiny_trainer(tmp_path, straight, **SIX).run()
    first = tiny_trainer(tmp_path, cut, **SIX)
    finish = first._finish

    def again(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return finish(*args)

    first._finish = again  # type: ignore[method-assign, assignment]
    stop_in_evaluation(first, lambda p, s: s == 4)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    tiny_trainer(tmp_path, cut, **SIX).run(resume=True)
    assert_same_run(straight, cut)


def test_artifact_and_report_are_there_while_the_run_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "run"
    run = tiny_trainer(tmp_path, output, **scripted(0.1, 0.3, 0.9, 0.2, 0.2), **{
        "training": {"steps": 4, "save_every": 3}, "evaluation": {"every": 2},
    })  # fmt: skip
    seen: list[tuple[int, int, str]] = []

    def look() -> None:
        metrics = read_artifact_info(output / "artifact").metrics
        seen.append((metrics["steps"], metrics["best_step"], metrics["state"]))
        assert "in training" in (output / "artifact" / "README.md").read_text()
        assert "still going on" in (output / "report.html").read_text()
        assert not (output / "summary.json").exists()

    run.after_publish = look
    run.run()
    assert seen == [
        (0, 0, "in training, 0 of 4 steps"),
        (2, 2, "in training, 2 of 4 steps"),
        (3, 2, "in training, 3 of 4 steps"),
    ]
    info = read_artifact_info(output / "artifact")
    assert "state" not in info.metrics and info.metrics["best_step"] == 2
    assert not list(output.glob(".artifact*"))


def test_a_report_that_cannot_be_drawn_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_trainer(tmp_path, tmp_path / "run", **QUICK)
    draw, calls = run.parts.write_report, []

    def broken(folder: Path) -> object:
        calls.append(folder)
        if len(calls) == 1:
            raise RuntimeError("no ink")
        return draw(folder)

    object.__setattr__(run.parts, "write_report", broken)
    assert run.run()["steps"] == 3
    assert "the report could not be drawn (no ink)" in caplog.text
    assert (tmp_path / "run" / "report.html").is_file()


MEMBERS = [{"name": "a", "changes": {"seed": 1}}, {"name": "b", "changes": {"seed": 2}}]
POPULATION: dict[str, Any] = {"population": MEMBERS, "evaluation": {"every": 1}}


def test_a_population_goes_on_with_every_member(tmp_path: Path) -> None:
    output, straight = tmp_path / "run", tmp_path / "straight"
    constant = {"save_every": 1, "optimizer": {"schedule": "constant"}}
    begin(tmp_path, output, **POPULATION, training={"steps": 4, **constant})
    longer = {**POPULATION, "training": {"steps": 8, **constant}}
    recipe = tiny_recipe(tmp_path, **longer)
    built = build_run(recipe, tmp_path, output)
    assert isinstance(built, Population)
    with claim_folder(output, recipe, tmp_path, True) as begun:
        stop_at(built.members["a"], 3)  # killed on the way: the member is not taken for complete
        assert built.run(resume=begun)["stopped_because"] == "SIGINT"
    assert (output / "artifact" / "prompt.json").is_file()
    summary = go_on(tmp_path, output, **longer)
    assert {name: row["steps"] for name, row in summary["members"].items()} == {"a": 4, "b": 4}
    begin(tmp_path, straight, **longer)
    for name in ("a", "b"):
        rows = [comparable_rows(r / "members" / name, "metrics") for r in (output, straight)]
        assert rows[0] == rows[1]
    assert json.loads((output / "summary.json").read_text())["steps"] == 8


def test_a_crash_before_a_member_goes_on_does_not_leave_it_behind(tmp_path: Path) -> None:
    """The population's recipe is the new one, the members' are not."""
    output = tmp_path / "run"
    begin(tmp_path, output, **POPULATION, training={"steps": 4, "save_every": 1})
    longer = {**POPULATION, "training": {"steps": 6, "save_every": 1}}
    with claim_folder(output, tiny_recipe(tmp_path, **longer), tmp_path, True):
        pass
    summary = go_on(tmp_path, output, **longer)
    assert {row["steps"] for row in summary["members"].values()} == {3}


def test_a_search_goes_on(tmp_path: Path) -> None:
    search = {"type": "texts", "texts": ["in here", "there"], "completions": 200}
    plain = {"prompt": {"type": "text", "text": "the sun", "num_virtual_tokens": None}}
    del plain["prompt"]["num_virtual_tokens"]
    recipe = tiny_recipe(tmp_path)
    tree = {**recipe.plain(), **plain, "search": search, "algorithm": {"type": "grpo"}}

    def made(steps: int) -> Any:
        training = {"steps": steps, "queries_per_step": 1, "save_every": 1}
        return type(recipe).model_validate({**tree, "training": training})

    for steps, output in ((2, "run"), (4, "run"), (4, "straight")):
        resume = (tmp_path / output).exists()
        check_folder(tmp_path / output, made(steps), tmp_path, resume)
        built = build_run(made(steps), tmp_path, tmp_path / output)
        with claim_folder(tmp_path / output, made(steps), tmp_path, resume) as begun:
            assert built.run(resume=begun)["steps"] == steps
    rows = [comparable_rows(tmp_path / r, "metrics") for r in ("run", "straight")]
    assert rows[0] == rows[1]


def test_a_crash_while_a_checkpoint_is_replaced_loses_none(tmp_path: Path) -> None:
    output = tmp_path / "run"
    tiny_trainer(tmp_path, output, **QUICK).run()
    checkpoints = output / "checkpoints"
    for step in (1, 2):
        shutil.rmtree(checkpoints / f"step_{step:06d}", ignore_errors=True)
    (checkpoints / "step_000003").rename(checkpoints / ".step_000003.old")
    assert tiny_trainer(tmp_path, output, **QUICK).run(resume=True)["steps"] == 3
    assert steps_of(output) == [1, 2, 3]
    assert [path.name for path in checkpoints.iterdir()] == ["step_000003"]
