"""The W&B tracker: offline runs read back from their files, and it never asks or waits."""

from __future__ import annotations

import importlib
import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprompt.errors import InputError
from rlprompt.tracking import wandb_tracker as tracking_wandb
from rlprompt.tracking.tracker import (
    TrackerGroup,
    TrackingSettings,
)
from rlprompt.tracking.wandb_tracker import WandbTracker
from tests.fixtures.tracking import EVALUATION, completion, run_info


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


@pytest.mark.slow
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
