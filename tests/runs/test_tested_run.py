"""The test queries: met once, at the end, by what is compared; they choose nothing."""

from __future__ import annotations

import json
import os
import signal
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rlprompt.certify.comparison import paired_difference
from rlprompt.evaluation.heldout import HeldoutEvaluator
from rlprompt.files import read_jsonl
from rlprompt.recipe.build import build_run
from rlprompt.reports.report import write_report
from rlprompt.runs.population import Population
from tests.fixtures.runs import tiny_recipe, tiny_trainer

TEXTS = ["Use many vowels.", "the rain", "one line"]
SETTINGS: dict[str, Any] = {
    "data": {"heldout": 2, "test": 2},
    "evaluation": {"every": 1, "handwritten": "Use many vowels.", "texts": TEXTS},
}


def test_everything_that_is_compared_meets_the_test_queries_once(tmp_path: Path) -> None:
    run = tiny_trainer(tmp_path, tmp_path / "run", **SETTINGS)
    assert run.parts.test is not None
    summary = run.run()
    rows = [
        r for r in read_jsonl(tmp_path / "run" / "evaluation.jsonl") if r.get("split") == "test"
    ]
    known = {"base", "handwritten", "best_text", "learned"}
    assert {row["who"] for row in rows} - {"start"} == known and len(rows) == len(summary["test"])
    assert summary["tested_steps"] == [summary["best_step"]]
    verdict = summary["verdict"]
    assert verdict["split"] == "test" and verdict["num_queries"] == 2
    assert verdict["num_compared"] == 1  # chosen on other queries

    # What the verdict says is what the completions say.
    completions = [
        row for row in read_jsonl(tmp_path / "run" / "completions.jsonl") if row["split"] == "test"
    ]
    tables = {
        who: np.array([r["reward"] for r in completions if r["who"] == who]).reshape(2, -1)
        for who in ("learned", "base")
    }
    told = verdict["differences"]["base"]["interval"]["value"]
    assert told == np.float64(paired_difference(tables["learned"], tables["base"]).interval.value)
    train = {
        row["query"]
        for row in read_jsonl(tmp_path / "run" / "completions.jsonl")
        if row["split"] != "test"
    }
    assert not train & {row["query"] for row in completions}
    page = write_report(tmp_path / "run").read_text()
    assert "Answers to test queries" in page and "Means on the test queries" in page


def test_the_best_of_the_texts_is_chosen_on_validation_queries(tmp_path: Path) -> None:
    run = tiny_trainer(tmp_path, tmp_path / "run", **SETTINGS)
    summary = run.run()
    rows = read_jsonl(tmp_path / "run" / "evaluation.jsonl")
    rewards = {row["who"]: row["reward"] for row in rows if row["who"].startswith("text_")}
    assert len(rewards) == 3
    best = max(rewards, key=lambda who: rewards[who])
    assert run.state.progress.best_text == TEXTS[int(best.removeprefix("text_"))]
    assert summary["heldout"]["best_text"]["reward"] == rewards[best]


def test_without_test_queries_the_verdict_allows_for_the_choice(tmp_path: Path) -> None:
    summary = tiny_trainer(tmp_path, tmp_path / "run", evaluation={"every": 1}).run()
    verdict = summary["verdict"]
    assert "test" not in summary and verdict["split"] == "validation"
    assert verdict["num_compared"] == summary["num_compared"] == 4  # steps 0 to 3


def test_without_held_out_queries_nothing_is_claimed(tmp_path: Path) -> None:
    summary = tiny_trainer(tmp_path, tmp_path / "run", data={"heldout": 0}).run()
    assert summary["learned"] is None
    assert "no query was held out" in summary["verdict"]["sentence"]


def test_a_run_that_goes_on_after_its_end_says_that_it_was_tested_before(tmp_path: Path) -> None:
    scripted = {"heldout": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}
    rewards = [{"path": "rewards.py:Scripted", "name": "scripted", "options": scripted}]
    settings = {**SETTINGS, "rewards": rewards}
    first = tiny_trainer(tmp_path, tmp_path / "run", **settings).run()
    assert first["tested_steps"] == [3]
    longer = tiny_trainer(tmp_path, tmp_path / "run", training={"steps": 5}, **settings)
    summary = longer.run(resume=True)
    assert summary["tested_steps"] == [3, 5] and summary["verdict"]["num_compared"] == 2


def test_a_signal_during_the_test_is_a_run_that_goes_on(tmp_path: Path) -> None:
    run = tiny_trainer(tmp_path, tmp_path / "run", **SETTINGS)
    test = run.parts.test
    assert test is not None
    evaluate = test.evaluate

    def stopped(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    test.evaluate = stopped  # type: ignore[method-assign]
    summary = run.run()
    assert summary["stopped_because"] == "SIGTERM" and "test" not in summary
    assert summary["verdict"]["split"] == "validation"
    again = tiny_trainer(tmp_path, tmp_path / "run", **SETTINGS).run(resume=True)
    assert again["stopped_because"] == "finished" and again["verdict"]["split"] == "test"
    straight = tiny_trainer(tmp_path, tmp_path / "straight", **SETTINGS).run()
    assert again["test"] == straight["test"]


def test_of_a_population_one_prompt_meets_the_test_queries(tmp_path: Path) -> None:
    members = [{"name": name, "changes": {"seed": seed}} for seed, name in enumerate("abc")]
    recipe = tiny_recipe(tmp_path, population=members, **SETTINGS)
    run = build_run(recipe, tmp_path, tmp_path / "run", Console(file=StringIO()))
    assert isinstance(run, Population)
    summary = run.run()
    tested = {
        name: [r for r in read_jsonl(member.folder / "evaluation.jsonl") if "split" in r]
        for name, member in run.members.items()
    }
    assert {name for name, rows in tested.items() if rows} == {summary["best_member"]}
    assert summary["verdict"]["split"] == "test"
    assert summary["num_compared"] == 6  # two evaluations of each of three members
    page = (tmp_path / "run" / "report.html").read_text()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test"] == summary["test"]
    assert all(f"<th>{name}</th>" in page for name in "abc")
    assert "Validation reward of each member" in page


def test_test_and_validation_evaluators_are_of_different_queries(tmp_path: Path) -> None:
    parts = tiny_trainer(tmp_path, tmp_path / "run", **SETTINGS).parts
    assert isinstance(parts.test, HeldoutEvaluator)
    asked = [{query.text for query in side} for side in (parts.data.test, parts.data.heldout)]
    assert len(asked[0]) == len(asked[1]) == 2 and not asked[0] & asked[1]
