"""`inspect eval --model=rlprompt/PATH`, run for real where inspect-ai is installed.

It may be installed in an environment of its own (its pins are many): name that environment's Python
as RLPROMPT_INSPECT_PYTHON. The entry point is given by hand, as an installed rlprompt would.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlprompt.api import open_model
from rlprompt.evaluation.inspect_logs import read_inspect_log
from tests.fixtures.tiny import save_tiny

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("RLPROMPT_INSPECT_PYTHON")
TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, system_message

@task
def quiz():
    samples = [Sample(id=f"s{i}", input=q, target="a") for i, q in enumerate(["rain", "he"])]
    steps = [system_message("Be kind."), generate()]
    return Task(dataset=samples, solver=steps, scorer=includes())
"""


@pytest.mark.slow
@pytest.mark.skipif(
    PYTHON is None and importlib.util.find_spec("inspect_ai") is None,
    reason="inspect-ai is not installed; install it, or set RLPROMPT_INSPECT_PYTHON",
)
def test_inspect_evaluates_a_prompt_and_its_log_is_read(tmp_path: Path) -> None:
    model = open_model(str(save_tiny(tmp_path / "model")), dtype="float32", device="cpu")
    model.prompt("Answer in one line.").save(tmp_path / "artifact")
    info = tmp_path / "rlprompt_here-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rlprompt-here\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[inspect_ai]\nrlprompt = rlprompt.suites.inspect_model\n"
    )
    (tmp_path / "task.py").write_text(TASK)
    done = subprocess.run(
        [
            PYTHON or sys.executable, "-m", "inspect_ai", "eval", "task.py",
            "--model", f"rlprompt/{tmp_path / 'artifact'}", "--epochs", "2", "--max-tokens", "5",
            "--temperature", "1.0", "--log-format", "json", "--log-dir", "logs",
            "--display", "plain",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "logs").glob("*.json")
    content = json.loads(file.read_text())
    assert content["status"] == "success", content.get("error")
    answers = {
        (each["id"], each["epoch"]): each["output"]["completion"] for each in content["samples"]
    }
    assert len(answers) == 4
    assert any(answers[id_, 1] != answers[id_, 2] for id_ in ("s0", "s1"))
    log = read_inspect_log(file)
    assert log.task == "quiz"
    assert {id_: len(own) for id_, own in log.values["includes"].items()} == {"s0": 2, "s1": 2}


def test_the_entry_point_names_the_module() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points.inspect_ai]\nrlprompt = "rlprompt.suites.inspect_model"' in text
