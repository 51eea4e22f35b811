"""Runs side by side: paired where they can be, and said where they cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlprompt.certify.comparison import paired_difference
from rlprompt.cli.commands.compare import run as compare_command
from rlprompt.errors import InputError
from rlprompt.files import to_json, write_atomic
from rlprompt.reports.compare import compare_runs, write_comparison
from rlprompt.tracking.tracker import RunInfo
from rlprompt.tracking.trackers import JsonlTracker

HOSTILE = "<script>alert(1)</script>"
REWARDS = [{"path": "a.py:reward", "name": "a", "weight": 1.0}]


def rows(values: np.ndarray, split: str, prefix: str = "query") -> list[dict[str, Any]]:
    return [
        {
            "split": split,
            "who": "learned",
            "query": f"{prefix} {number}",
            "completion": HOSTILE,
            "reward": None if np.isnan(value) else float(value),
            "rewards": {},
        }
        for number, each in enumerate(values)
        for value in each
    ]


def make_run(
    folder: Path, values: np.ndarray, split: str = "heldout", prefix: str = "query", **recipe: Any
) -> None:
    """A run that was evaluated at steps 0, 2 and 4 and kept step 2."""
    tracker = JsonlTracker()
    tracker.start(RunInfo(name="test", output_dir=folder, steps=4, base="tiny"))
    for step in (0, 2, 4):
        shown = values if step == 2 else np.zeros_like(values)
        tracker.log_evaluation(step, "learned", {"reward": float(np.nanmean(shown)), "rewards": {}})
        tracker.log_completions(step, rows(shown, "heldout", prefix))
        tracker.log_metrics(step, {"reward": 0.1 * step})
    if split == "test":
        tracker.log_completions(4, rows(values, "test", prefix))
    tracker.finish({})
    summary = {"best_step": 2, "num_compared": 3, "tested_steps": [2], "learned": True}
    write_atomic(folder / "summary.json", to_json(summary))
    settings = {"name": folder.name, "rewards": REWARDS, "training": {"steps": 4}, **recipe}
    write_atomic(folder / "recipe.resolved.yaml", to_json(settings))


def values(seed: int, shift: float = 0.0) -> np.ndarray:
    return shift + np.random.default_rng(seed).normal(scale=0.1, size=(30, 2))


def test_learned_prompts_are_compared_query_by_query(tmp_path: Path) -> None:
    ours, theirs = values(1, 0.5), values(2)
    make_run(tmp_path / "a", theirs)
    make_run(tmp_path / "b", ours, training={"steps": 9})
    found = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert found.split == "validation" and found.unpaired is None
    # Each was chosen from 3 evaluations on these very queries.
    expected = paired_difference(ours, theirs, num_compared=9)
    assert found.runs[0].against_first is None and found.runs[1].against_first == expected
    assert expected.outcome == "better"
    assert found.differing == {"name": ["a", "b"], "training.steps": [4, 9]}


def test_test_queries_count_where_all_runs_met_them(tmp_path: Path) -> None:
    make_run(tmp_path / "a", values(1), "test")
    make_run(tmp_path / "b", values(2), "test")
    make_run(tmp_path / "c", values(3))
    both = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert both.split == "test" and both.runs[1].against_first is not None
    assert both.runs[1].against_first.num_compared == 1
    assert compare_runs([tmp_path / name for name in "abc"]).split == "validation"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rewards": [{"path": "b.py:reward"}]}, "rewarded differently"),
        ({"prefix": "another"}, "evaluated on different queries"),
    ],
    ids=["rewards", "queries"],
)
def test_what_cannot_be_compared_is_said(changes: Any, why: str, tmp_path: Path) -> None:
    make_run(tmp_path / "a", values(1))
    make_run(tmp_path / "b", values(2, 5.0), **changes)
    found = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert found.unpaired is not None and why in found.unpaired
    assert [each.against_first for each in found.runs] == [None, None]
    page = write_comparison(found, tmp_path / "page.html").read_text()
    assert why in page and "better than" not in page


def test_the_page_is_inert_and_the_json_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = tmp_path / "<b>x"
    make_run(tmp_path / "a", values(1), model={"path": HOSTILE})
    make_run(hostile, np.where(values(2) > 0.1, np.nan, values(2)))
    output = tmp_path / "out.html"
    compare_command([tmp_path / "a", hostile], output, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found["runs"]] == ["a", "<b>x"]
    assert found["runs"][1]["minus_first"]["outcome"] in ("worse", "unclear", "better")
    page = output.read_text()
    assert "<script" not in page and "<b>x" not in page and page.count("<svg") == 3
    compare_command([tmp_path / "a", hostile], output, as_json=False)
    assert "<b>x" in capsys.readouterr().out


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "a", values(1))
    for folders, sentence in (
        ([tmp_path / "a"], "one run cannot be compared"),
        ([tmp_path / "a", tmp_path / "x" / ".." / "a"], "is named twice"),
        ([tmp_path / "a", tmp_path / "no"], "holds no run"),
    ):
        with pytest.raises(InputError, match=sentence):
            compare_runs(folders)
