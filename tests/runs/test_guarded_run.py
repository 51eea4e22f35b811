"""A run whose proxy is hacked: the guard ends it, and the report shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlprompt.files import read_jsonl
from rlprompt.reports.report import write_report
from tests.fixtures.runs import comparable_rows, tiny_trainer

# The proxy rises for ever; gold turns at step 4. Both are scripted: this tests the guard's part.
REWARDS = """
def proxy(completions, trainer_state, **kwargs):
    return [0.1 * trainer_state.global_step + 0.001 * i for i in range(len(completions))]

def gold(completions, trainer_state, **kwargs):
    step = trainer_state.global_step
    return [0.1 * min(step, 8 - step)] * len(completions)
"""
GUARDED: dict[str, Any] = {
    "rewards": [
        {"path": "guarded.py:proxy", "name": "proxy"},
        {"path": "guarded.py:gold", "name": "gold", "role": "metric"},
    ],
    "guards": [
        {
            "type": "parting",
            "name": "hacked",
            "proxy": "proxy",
            "gold": "gold",
            "window": 2,
            "patience": 2,
            "action": "stop",
        }
    ],
    "training": {"steps": 14, "save_every": 3},
    "evaluation": {"every": 2},
}


@pytest.fixture(autouse=True)
def _rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guarded.py").write_text(REWARDS)
    monkeypatch.setattr("rlprompt.recipe.build.write_report", lambda folder: None)


def test_the_guard_ends_the_run_and_says_why(tmp_path: Path) -> None:
    summary = tiny_trainer(tmp_path, tmp_path / "run", **GUARDED).run()
    assert summary["stopped_because"] == "guard:hacked"
    (alarm,) = summary["alarms"]
    assert alarm["stop"] and alarm["step"] == summary["steps"] < 14
    assert alarm["reason"].startswith("proxy rose from")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row.get("guards/hacked") for row in rows] == [0.0] * (len(rows) - 1) + [1.0]


def test_a_resumed_run_stops_at_the_same_step_and_stays_stopped(tmp_path: Path) -> None:
    whole = tiny_trainer(tmp_path, tmp_path / "whole", **GUARDED).run()
    short = {**GUARDED, "training": {"steps": 5, "save_every": 3}}
    tiny_trainer(tmp_path, tmp_path / "parts", **short).run()
    resumed = tiny_trainer(tmp_path, tmp_path / "parts", **GUARDED).run(resume=True)
    assert resumed["alarms"] == whole["alarms"]
    assert comparable_rows(tmp_path / "parts", "metrics")[-1]["step"] == whole["steps"]
    again = tiny_trainer(tmp_path, tmp_path / "parts", **GUARDED).run(resume=True)
    assert again["steps"] == whole["steps"]
    assert again["stopped_because"] == "guard:hacked"


def test_the_artifact_is_chosen_by_gold_when_the_recipe_says_so(tmp_path: Path) -> None:
    by_proxy = tiny_trainer(tmp_path, tmp_path / "a", **GUARDED).run()
    chosen = {**GUARDED, "evaluation": {"every": 2, "select_by": "gold"}}
    by_gold = tiny_trainer(tmp_path, tmp_path / "b", **chosen).run()
    # Evaluations see global_step = the step; gold is highest at 4, the proxy at the end.
    assert by_gold["best_step"] == 4
    assert by_proxy["best_step"] > 4
    assert by_gold["heldout"]["learned"]["rewards"]["gold"] == pytest.approx(0.4)


def test_a_guard_may_watch_heldout_evaluations(tmp_path: Path) -> None:
    guard = {**GUARDED["guards"][0], "split": "heldout", "patience": 1}
    changes = {**GUARDED, "guards": [guard], "evaluation": {"every": 1}}
    summary = tiny_trainer(tmp_path, tmp_path / "run", **changes).run()
    assert summary["stopped_because"] == "guard:hacked"


def test_the_report_shows_the_alarm_and_proxy_against_gold(tmp_path: Path) -> None:
    output = tmp_path / "run"
    summary = tiny_trainer(tmp_path, output, **GUARDED).run()
    recipe = tiny_trainer(tmp_path, output, **GUARDED).parts.recipe
    (output / "recipe.resolved.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    html = write_report(output).read_text(encoding="utf-8")
    assert f"Guard &#39;hacked&#39;, step {summary['steps']}: proxy rose from" in html
    assert "proxy against gold" in html
    assert "gold: gold" in html
    bare = {**GUARDED, "guards": []}
    tiny_trainer(tmp_path, tmp_path / "bare", **{**bare, "training": {"steps": 3}}).run()
    assert "against gold" not in write_report(tmp_path / "bare").read_text(encoding="utf-8")
