"""The GPU check: its time budget, and that no part can stop or silence the others."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu.world import PartFailedError, World
from benchmarks.gpu_check import Part

ROOT = Path(gpu_check.ROOT)
PARTS = {
    name: Part(name, f"tests.fixtures.gpu_parts:{name}", 60, "a test")
    for name in ("raises", "leaves", "dies", "finds_a_fault", "works")
}


def test_all_limits_together_stay_under_nine_minutes() -> None:
    # What comes on top: the grace of a part that is ended, wheels, and the start of the shell.
    assert sum(part.limit for part in gpu_check.PARTS) < gpu_check.BUDGET - 10
    assert gpu_check.BUDGET == 9 * 60
    assert all(part.limit > 0 for part in gpu_check.PARTS)


def test_every_part_names_a_function_that_is_there() -> None:
    names = [part.name for part in gpu_check.PARTS]
    assert len(set(names)) == len(names)
    for part in gpu_check.PARTS:
        module, _, function = part.target.partition(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, part


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One check over all parts that go wrong, and one that works after them."""
    output = tmp_path_factory.mktemp("gpu") / "new" / "folder"
    options = gpu_check.parse(["--output", str(output)])
    assert gpu_check.check(options, PARTS.values()) == 1
    found: dict[str, Any] = json.loads((output / "gpu_check.json").read_text())
    assert (output / "summary.md").read_text() == gpu_check.summary(found)
    log = (output / "log.txt").read_text()
    assert "it says something" in log and "ValueError: no such | thing" in log
    assert len(list(output.iterdir())) <= 8
    return {part["name"]: part for part in found["parts"]}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "ValueError: no such | thing"),
        ("leaves", "SystemExit: error: a package is missing"),
        ("dies", "ended with 7 and left no result: last words"),
        ("finds_a_fault", "does not hold: results are equal"),
    ],
)
def test_a_part_that_fails_says_why(record: dict[str, Any], name: str, reason: str) -> None:
    assert record[name]["status"] == "failed"
    assert record[name]["reason"] == reason


def test_what_was_measured_is_kept_also_where_it_is_wrong(record: dict[str, Any]) -> None:
    assert record["finds_a_fault"]["figures"] == {"gap": 0.5}


def test_failures_stop_nobody(record: dict[str, Any]) -> None:
    assert record["works"]["status"] == "passed"
    assert record["works"]["figures"] == {"dry": False, "speed": 1.5}
    assert 0 < record["works"]["seconds"] < record["works"]["limit"] == 60


def test_a_part_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    options = gpu_check.parse(["--output", str(tmp_path)])
    part = Part("hangs", "tests.fixtures.gpu_parts:hangs", 4, "a test")
    done = gpu_check.run_part(part, options, tmp_path / "log.txt")
    assert done["status"] == "timeout"
    assert done["reason"] == "ended at its limit of 4 s"
    child = tmp_path / "child"
    if child.exists():  # a busy machine may not have come so far within the limit
        deadline = time.monotonic() + 60  # a killed process leaves when it is scheduled next
        while runs(int(child.read_text())):
            assert time.monotonic() < deadline, "the child outlived its part"
            time.sleep(0.1)


def runs(pid: int) -> bool:
    """Whether a process is there and has not ended; one that nobody has waited for has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("target", [part.target for part in gpu_check.PARTS])
def test_no_part_passes_without_a_gpu(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests in the interpreter and a calculated roofline would, and say nothing about a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module, _, name = target.partition(":")
    part = getattr(importlib.import_module(module), name)
    with pytest.raises(PartFailedError, match="sees no GPU"):
        part(World(False, None, tmp_path, tmp_path))


def test_the_table_holds_what_a_reader_needs() -> None:
    part = {"name": "a", "status": "failed", "seconds": 1.0, "limit": 2}
    parts = [
        {**part, "reason": "one | two\nlines", "figures": {}},
        {**part, "reason": "", "figures": {"x": 0.12345, "deep": {"y": 2, "deeper": {"z": 1}}}},
    ]
    shown = gpu_check.summary({"dry_run": True, "parts": parts})
    assert "no figure here says anything about a GPU" in shown
    assert "| one \\| two lines |" in shown
    assert "| x 0.1235, deep.y 2 |" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--output"),
        (["--output", __file__], "is a file; name a folder"),
        (["--output", "o", "--model", "nowhere"], "has no config.json"),
        (["--output", "o", "--only", "step_70b"], "invalid choice"),
    ],
    ids=["no output", "output is a file", "no model", "no such part"],
)
def test_what_cannot_be_is_refused_at_once(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu_check.parse(arguments)
    assert refused.value.code == 2
    assert said in capsys.readouterr().err


def test_a_model_without_effect_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        gpu_check.parse(["--output", "o", "--model", str(tmp_path), "--dry-run"])
    assert "no effect on a dry run" in capsys.readouterr().err


def shell(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *arguments],
        env={**os.environ, "RLPROMPT_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_script_passes_arguments_on(tmp_path: Path) -> None:
    done = shell("gpu_check.sh", "--output", str(tmp_path), "--only", "nothing")
    assert done.returncode == 2 and "invalid choice: 'nothing'" in done.stderr


@pytest.mark.parametrize("arguments", [("--wheels",), ("--wheels=nowhere",)], ids=["none", "empty"])
def test_a_folder_without_wheels_is_refused(arguments: tuple[str, ...]) -> None:
    done = shell("gpu_check.sh", "--output", "o", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_wheels_that_constraints_do_not_pin_are_refused(tmp_path: Path) -> None:
    done = shell("gpu_wheels.sh", str(tmp_path / "wheels"), "no-such-package")
    assert done.returncode == 2 and "constraints.txt has no no-such-package" in done.stderr
    (tmp_path / "a-1-py3-none-any.whl").touch()
    done = shell("gpu_wheels.sh", str(tmp_path))
    assert done.returncode == 2 and "holds wheels already" in done.stderr


def test_every_wheel_that_is_collected_is_pinned() -> None:
    text = (ROOT / "scripts" / "gpu_wheels.sh").read_text()
    wanted = text.partition("WANTED=(")[2].partition(")")[0].split()
    lines = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    pinned = {line.partition("==")[0] for line in lines}
    assert wanted and {name.replace("_", "-") for name in wanted} <= pinned
