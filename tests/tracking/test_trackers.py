from __future__ import annotations

import io
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.tracking.make import TrackersSettings, build_trackers
from rlprompt.tracking.tracker import (
    Histogram,
    RunInfo,
    Tracker,
    TrackerGroup,
    TrackingSettings,
    evaluation_metrics,
    histogram,
)
from rlprompt.tracking.trackers import ConsoleTracker, JsonlTracker, TensorBoardTracker
from tests.fixtures.tracking import EVALUATION, completion, run_info


class Recorder(Tracker):
    """A tracker that notes its calls and fails where it is told to."""

    def __init__(self, fails_in: str = "") -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.fails_in = fails_in

    def note(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self.fails_in:
            raise ConnectionError("the server is gone\nsecond line")

    def start(self, run: RunInfo) -> None:
        self.note("start")

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self.note("metrics", step)

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.note("completions", step, [row["split"] for row in rows])

    def log_evaluation(self, step: int, who: str, metrics: Mapping[str, Any]) -> None:
        self.note("evaluation", step, who)

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        self.note("histograms", step, sorted(histograms))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.note("finish", dict(summary))


def test_a_tracker_that_cannot_start_stops_the_run(tmp_path: Path) -> None:
    first, last = Recorder(), Recorder()
    group = TrackerGroup({"first": first, "bad": Recorder("start"), "last": last})
    with pytest.raises(InputError, match=r"Tracker 'bad' cannot start .*the server is gone"):
        group.start(run_info(tmp_path))
    assert first.calls == [("start",), ("finish", {})]
    assert last.calls == []


def test_a_tracker_that_fails_later_never_stops_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Recorder("metrics"), Recorder()
    group = TrackerGroup({"bad": bad, "good": good})
    with caplog.at_level(logging.WARNING):
        group.start(run_info(tmp_path))
        for step in (1, 2, 3):
            group.log_metrics(step, {"reward": 1.0})
        group.log_evaluation(3, "learned", EVALUATION)
        warnings = [record.getMessage() for record in caplog.records]
        group.finish({"steps": 3})
    assert len(warnings) == 1 and "the server is gone" in warnings[0]
    assert "second line" not in warnings[0]
    assert group.lost == {"bad": 4}
    assert bad.calls == [("start",), ("metrics", 1), ("finish", {"steps": 3})]
    assert [call[0] for call in good.calls] == ["start", *["metrics"] * 3, "evaluation", "finish"]
    assert "lost 4 records" in caplog.records[-1].getMessage()


def test_finish_may_fail_and_happens_once(tmp_path: Path) -> None:
    bad, good = Recorder("finish"), Recorder()
    group = TrackerGroup({"bad": bad, "good": good})
    group.start(run_info(tmp_path))
    group.finish({})
    group.finish({})
    assert good.calls == [("start",), ("finish", {})]
    assert group.lost == {"bad": 1}


def test_a_keyboard_interrupt_is_not_a_failing_tracker(tmp_path: Path) -> None:
    class Interrupted(Recorder):
        def note(self, *call: Any) -> None:
            if call[0] == "metrics":
                raise KeyboardInterrupt

    group = TrackerGroup({"it": Interrupted()})
    group.start(run_info(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        group.log_metrics(1, {})


def test_training_completions_every_n_steps_and_held_out_ones_always(tmp_path: Path) -> None:
    class Tables(Recorder):
        shows_tables = True

    log, tables = Recorder(), Tables()
    settings = TrackingSettings(completions_every=2, tables_every=4)
    group = TrackerGroup({"it": log, "tables": tables}, settings)
    group.start(run_info(tmp_path))
    for step in (1, 2, 4):
        group.log_completions(step, [completion("train"), completion("heldout")])
    group.log_completions(3, [completion("train")])
    assert log.calls[1:] == [
        ("completions", 1, ["heldout"]),
        ("completions", 2, ["train", "heldout"]),
        ("completions", 4, ["train", "heldout"]),
    ]
    assert tables.calls[1:] == [
        ("completions", 1, ["heldout"]),
        ("completions", 2, ["heldout"]),
        ("completions", 4, ["train", "heldout"]),
    ]


def test_histograms_every_n_steps(tmp_path: Path) -> None:
    tracker = Recorder()
    group = TrackerGroup({"it": tracker}, TrackingSettings(tables_every=2))
    group.start(run_info(tmp_path))
    for step in (1, 2, 3, 4):
        group.log_histograms(step, {"norms": torch.ones(3), "none": torch.ones(0)})
    assert tracker.calls[1:] == [("histograms", 2, ["norms"]), ("histograms", 4, ["norms"])]


@pytest.mark.parametrize("values", [torch.randn(4, 7), torch.ones(5), torch.zeros(2)])
def test_a_histogram_has_every_value_in_one_bin(values: torch.Tensor) -> None:
    made = histogram(values)
    flat = values.flatten().tolist()
    assert len(made.edges) == len(made.counts) + 1 and sum(made.counts) == len(flat)
    assert made.edges == sorted(set(made.edges))
    assert made.edges[0] <= min(flat) and max(flat) <= made.edges[-1]
    assert made.total == pytest.approx(sum(flat), abs=1e-5)
    assert made.total_squares == pytest.approx(sum(v * v for v in flat), abs=1e-4)
    expected = np.histogram(np.array(flat), bins=np.array(made.edges))[0]
    assert list(made.counts) == expected.tolist()


def test_a_histogram_leaves_out_what_is_not_finite() -> None:
    assert sum(histogram(torch.tensor([1.0, math.nan, math.inf, 2.0])).counts) == 2
    assert sum(histogram(torch.tensor([math.nan])).counts) == 0


def test_jsonl_files_hold_what_was_logged_and_resume_drops_the_repeated_steps(
    tmp_path: Path,
) -> None:
    for resume_step in (None, 2):
        tracker = JsonlTracker()
        tracker.start(run_info(tmp_path, resume_step))
        first = 0 if resume_step is None else resume_step + 1
        for step in range(first, 5):
            tracker.log_metrics(step, {"reward": float(step), "kl": float("nan")})
            tracker.log_completions(step, [completion(), completion()])
            tracker.log_evaluation(step, "learned", EVALUATION)
        tracker.finish({})
    metrics = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["reward"], row["kl"]) for row in metrics] == [
        (step, step, None) for step in range(5)
    ]
    assert all(row["time"] > 1e9 for row in metrics)
    completions = read_jsonl(tmp_path / "completions.jsonl")
    assert [row["step"] for row in completions] == sorted([*range(5), *range(5)])
    assert completions[0] == {"step": 0, **completion()}
    evaluations = read_jsonl(tmp_path / "evaluation.jsonl")
    assert evaluations[-1] == {"step": 4, "who": "learned", **EVALUATION, "base_logprob": None}


def test_a_new_run_in_a_used_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="already holds the rows of another run"):
        build_trackers(TrackersSettings(trackers=("jsonl",))).start(run_info(tmp_path))


def test_jsonl_is_written_even_if_not_named(tmp_path: Path) -> None:
    group = build_trackers(TrackersSettings(trackers=()))
    group.start(run_info(tmp_path))
    group.log_metrics(1, {"reward": 1.0})
    group.finish({})
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1


def test_console_tracker_reports_the_run(tmp_path: Path) -> None:
    stream = io.StringIO()
    tracker = ConsoleTracker(Console(file=stream, force_terminal=False, width=80))
    tracker.start(run_info(tmp_path, resume_step=1))
    tracker.log_metrics(2, {"reward": 0.25})
    tracker.log_completions(2, [completion()])
    tracker.log_evaluation(2, "learned", EVALUATION)
    tracker.finish(
        {
            "steps": 2,
            "stopped_because": "finished",
            "heldout_reward_before": -1.0,
            "heldout_reward_after": 0.5,
        }
    )
    assert stream.getvalue().splitlines() == [
        "test: steps 1 to 4",
        "step 2/4: reward 0.25, left -",
        "step 2/4: held-out learned 0.5",
        "stopped (finished) at 2 steps; held-out reward: before -1, learned 0.5",
    ]


def test_settings_refuse_what_does_not_exist() -> None:
    with pytest.raises(ValidationError):
        TrackersSettings.model_validate({"trackers": ["mlflow"]})
    with pytest.raises(ValidationError):
        TrackingSettings(completions_every=0)


def test_evaluation_metrics_are_flat_and_finite() -> None:
    assert evaluation_metrics("base", EVALUATION) == {
        "eval/base/reward": 0.5,
        "eval/base/reward_std": 0.25,
        "eval/base/num_completions": 8.0,
        "eval/base/rewards/brevity": 1.5,
    }


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    # None in sys.modules makes an import fail as if the package were not there.
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    group = build_trackers(TrackersSettings.model_validate({"trackers": [tracker]}))
    with pytest.raises(InputError, match=f"pip install {tracker}"):
        group.start(run_info(tmp_path))


def test_tensorboard_events_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker()
    tracker.start(run_info(tmp_path))
    for step in (1, 2):
        tracker.log_metrics(step, {"reward": step / 2, "kl": None})
    tracker.log_completions(2, [completion(text="```\n<script>")])
    tracker.log_evaluation(2, "learned", EVALUATION)
    tracker.log_histograms(2, {"norms": histogram(torch.arange(8.0))})
    tracker.finish({})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.5), (2, 1.0)]
    assert "eval/learned/rewards/brevity" in events.Tags()["scalars"]
    assert "kl" not in events.Tags()["scalars"]
    (bins,) = events.Histograms("norms")
    assert (bins.step, bins.histogram_value.num, bins.histogram_value.sum) == (2, 8.0, 28.0)
