from __future__ import annotations

import importlib
import io
import json
import logging
import math
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from rlprompt.errors import InputError
from rlprompt.training import tracking_wandb
from rlprompt.training.files import read_jsonl
from rlprompt.training.tracker import (
    Histogram,
    RunInfo,
    TrackerGroup,
    TrackingSettings,
    evaluation_metrics,
    histogram,
)
from rlprompt.training.tracking import (
    ConsoleTracker,
    JsonlTracker,
    TensorBoardTracker,
    build_trackers,
)
from rlprompt.training.tracking_wandb import WandbTracker

EVALUATION = {
    "reward": 0.5,
    "reward_std": 0.25,
    "rewards": {"brevity": 1.5, "gate": None},
    "num_completions": 8,
    "base_logprob": float("nan"),
}


def run_info(folder: Path, resume_step: int | None = None) -> RunInfo:
    return RunInfo(
        name="test",
        output_dir=folder,
        steps=4,
        base="tiny",
        recipe={"seed": 1, "training": {"steps": 4}},
        identity={"base": "b" * 64, "dataset": "d" * 64, "chat template": "c" * 64},
        resume_step=resume_step,
    )


def completion(split: str = "train", text: str = "answer") -> dict[str, Any]:
    return {
        "split": split,
        "who": "learned",
        "query": "why?",
        "completion": text,
        "reward": 0.5,
        "rewards": {"brevity": 0.5},
        "terminated": True,
        "num_tokens": 3,
        "advantage": None,
    }


class Recorder:
    """A tracker that notes its calls and fails where it is told to."""

    def __init__(self, fails_in: str = "") -> None:
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
    log, tables = Recorder(), Recorder()
    settings = TrackingSettings(completions_every=2, tables_every=4)
    group = TrackerGroup({"it": log, "wandb": tables}, settings)
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
        build_trackers(TrackingSettings(trackers=["jsonl"])).start(run_info(tmp_path))


def test_jsonl_is_written_even_if_not_named(tmp_path: Path) -> None:
    group = build_trackers(TrackingSettings(trackers=[]))
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
        TrackingSettings.model_validate({"trackers": ["mlflow"]})
    with pytest.raises(ValidationError):
        TrackingSettings(completions_every=0)


def test_evaluation_metrics_are_flat_and_finite() -> None:
    assert evaluation_metrics("base", EVALUATION) == {
        "eval/base/reward": 0.5,
        "eval/base/reward_std": 0.25,
        "eval/base/num_completions": 8.0,
        "eval/base/rewards/brevity": 1.5,
    }


def wandb_records(folder: Path) -> Iterator[Any]:
    """Read the records of an offline run: a LevelDB log of protocol buffers."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data = path.read_bytes()
    position, message = 7, b""  # after the file's header
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = messages.Record()
            record.ParseFromString(message)
            yield record
            message = b""


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def wandb_kind(folder: Path, kind: str) -> list[Any]:
    """Records of a kind, also where they are requests to W&B's own process."""
    found = []
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "request":
            request = record.request
            if request.WhichOneof("request_type") == f"log_{kind}":
                found.append(getattr(getattr(request, f"log_{kind}"), kind))
        elif record.WhichOneof("record_type") == kind:
            found.append(getattr(record, kind))
    return found


def no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("wandb asked for something"))


def test_an_offline_wandb_run_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    no_questions(monkeypatch)
    settings = TrackingSettings(
        project="p", group="g", tags=["t"], notes="what it is for", tables_every=1
    )
    group = TrackerGroup({"wandb": WandbTracker(settings)}, settings)
    group.start(run_info(tmp_path))
    group.log_evaluation(0, "base", EVALUATION)
    for step in (1, 2):
        group.log_metrics(step, {"reward": step / 2, "kl": None})
        group.log_completions(step, [completion(text="<b>" + "x" * 40_000)])
        group.log_histograms(step, {"prompt/norms/embeddings": torch.arange(8.0)})
    group.finish({"steps": 2})
    assert group.lost == {}
    wandb.teardown()  # its process may still be writing the file when `finish` returns

    rows = wandb_history(tmp_path)
    assert [(r["step"], r["reward"]) for r in rows if "reward" in r] == [(1, 0.5), (2, 1.0)]
    assert [r["eval/base/rewards/brevity"] for r in rows if "eval/base/reward" in r] == [1.5]
    assert [r["step"] for r in rows if r.get("completions/train/nrows") == 1] == [1, 2]
    (table, _) = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/completions/*.json"))
    content = json.loads(table.read_text())
    assert dict(zip(content["columns"], content["data"][0], strict=True))["query"] == "why?"
    assert sum(sum(r.get("prompt/norms/embeddings/values", [])) for r in rows) == 2 * 8
    info = wandb_kind(tmp_path, "run")[0]
    assert (info.project, info.display_name, list(info.tags)) == ("p", "test", ["t"])
    assert (info.run_group, info.notes) == ("g", "what it is for")
    assert info.run_id == (tmp_path / "wandb_id").read_text()
    config = {item.key: json.loads(item.value_json) for item in info.config.update}
    assert config["recipe"] == {"seed": 1, "training": {"steps": 4}}
    assert config["identity"]["base"] == "b" * 64


def test_the_artifact_is_logged_with_what_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    no_questions(monkeypatch)
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    for name in ("prompt.safetensors", "prompt.json"):
        (artifact / name).write_text("1234")
    (tmp_path / "report.html").write_text("<html></html>")
    tracker = WandbTracker(TrackingSettings())
    tracker.start(run_info(tmp_path))
    tracker.finish({"steps": 2, "artifact": str(artifact), "heldout_reward_after": 0.5})
    wandb.teardown()
    artifacts = {each.name: each for each in wandb_kind(tmp_path, "artifact")}
    made, base, data = artifacts["test"], artifacts["base-tiny"], artifacts["data-dddddddddddd"]
    assert (made.type, base.type, data.type) == ("soft_prompt", "model", "dataset")
    assert not made.use_after_commit and base.use_after_commit and data.use_after_commit
    assert sorted(made.aliases) == ["latest", "step-2"]
    assert json.loads(made.metadata)["heldout_reward_after"] == 0.5
    assert json.loads(made.metadata)["base"] == json.loads(base.metadata)["fingerprint"] == "b" * 64
    files = {entry.path for entry in made.manifest.contents}
    assert files == {"artifact/prompt.safetensors", "artifact/prompt.json", "report.html"}


def test_a_requeued_run_goes_on_as_the_same_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    no_questions(monkeypatch)
    for resume_step in (None, 1):
        tracker = WandbTracker(TrackingSettings())
        tracker.start(run_info(tmp_path, resume_step))
        tracker.log_metrics((resume_step or 0) + 1, {"reward": 1.0})
        tracker.finish({})
    wandb.teardown()
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {path.name for path in files} == {f"run-{(tmp_path / 'wandb_id').read_text()}.wandb"}


def test_a_wandb_server_that_is_away_stops_a_new_run_and_not_a_resumed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb")
    no_questions(monkeypatch)
    monkeypatch.setattr(tracking_wandb, "_START_SECONDS", 3.0)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(InputError, match="set WANDB_MODE=offline"):
        WandbTracker(TrackingSettings()).start(run_info(tmp_path))
    tracker = WandbTracker(TrackingSettings())
    with caplog.at_level(logging.WARNING):
        tracker.start(run_info(tmp_path, resume_step=1))
    assert "goes on offline" in caplog.text
    tracker.log_metrics(2, {"reward": 1.0})
    tracker.finish({})
    wandb.teardown()
    assert [row["step"] for row in wandb_history(tmp_path) if "reward" in row] == [2]


@pytest.mark.parametrize("mode", ["online", "shared"])
def test_wandb_never_asks_for_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(InputError, match="set WANDB_API_KEY"):
        WandbTracker(TrackingSettings()).start(run_info(tmp_path))


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    # None in sys.modules makes an import fail as if the package were not there.
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    group = build_trackers(TrackingSettings.model_validate({"trackers": [tracker]}))
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
