"""What holds for every tracker of a recipe, found in the one list of them, and the example's."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from examples.extend.tracker import CsvTracker
from rlprompt.tracking.make import TRACKERS, TrackersSettings, build_trackers
from rlprompt.tracking.tracker import Histogram, Tracker, TrackingSettings
from tests.fixtures.tracking import EVALUATION, completion, run_info

KINDS: dict[str, type[Tracker]] = {**TRACKERS, "of one's own": CsvTracker}
SLOW = [pytest.param(n, marks=[pytest.mark.slow] if n == "wandb" else []) for n in KINDS]
SUMMARY: dict[str, Any] = {"steps": 2, "stopped_because": "finished"}


def tracker_of(name: str) -> Tracker:
    if name in ("wandb", "tensorboard"):
        pytest.importorskip(name)
    kind = KINDS[name]
    return kind.make(kind.Settings(), TrackingSettings(), Console(file=StringIO()))


def log(tracker: Tracker, step: int) -> None:
    """Everything that a step may report."""
    tracker.log_completions(step, [completion("train"), completion("heldout", "a\n\tb")])
    tracker.log_metrics(step, {"reward": 0.5, "loss": float("nan"), "entropy": None})
    tracker.log_evaluation(step, "learned", EVALUATION)
    tracker.log_histograms(step, {"norms": Histogram([1, 2], [0.0, 1.0, 2.0], 4.0, 6.0)})


@pytest.mark.parametrize("name", SLOW)
def test_it_takes_a_run_and_one_that_goes_on(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for resume_step, steps in ((None, (1, 2)), (1, (2, 3)), (-1, (1,))):
        tracker = tracker_of(name)
        tracker.start(run_info(folder, resume_step))
        for step in steps:
            log(tracker, step)
        tracker.finish(SUMMARY)
    assert sorted(tmp_path.iterdir()) == [folder]  # it writes below the run folder only


@pytest.mark.parametrize("name", SLOW)
def test_it_closes_after_a_crash(name: str, tmp_path: Path) -> None:
    tracker = tracker_of(name)
    tracker.start(run_info(tmp_path))
    log(tracker, 1)
    tracker.finish({})


@pytest.mark.parametrize("name", TRACKERS)
def test_a_recipe_names_it(name: str) -> None:
    settings = TrackersSettings.model_validate({"trackers": [name]})
    assert TrackersSettings.model_validate(settings.model_dump(mode="json")) == settings
    group = build_trackers(settings, Console(file=StringIO()))
    assert set(group.names) == {"jsonl", name}


def test_the_record_is_first_and_the_live_display_last() -> None:
    group = build_trackers(TrackersSettings(trackers=("console", "tensorboard", "jsonl")))
    assert group.names == ["jsonl", "tensorboard", "console"]
