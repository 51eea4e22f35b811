"""The commands of docs/quickstart.md run as they stand there, with a tiny model and fewer steps."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.cli.runs import rlprompt
from tests.docs.pages import DOCS
from tests.docs.test_commands import commands
from tests.fixtures.tiny import save_tiny

SHORTER = {
    "train": (
        *("model.path=MODEL", "model.device=cpu", "training.steps=2", "sampling.max_tokens=6"),
        *("prompt.init_text=be brief", "prompt.num_virtual_tokens=4"),
        *("evaluation.handwritten=be brief", "evaluation.max_queries=4"),
    ),
    "forecast": (
        *("model.path=MODEL", "model.device=cpu", "sampling.max_tokens=6"),
        *("prompt.init_text=be brief", "prompt.num_virtual_tokens=4"),
        *("evaluation.handwritten=be brief", "--queries", "4"),
    ),
}
"""What keeps the test short, by command: arguments that the page does not have."""


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(save_tiny(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    ran = []
    for command in commands(page):
        words = shlex.split(command, comments=True)[1:]
        words += [word.replace("MODEL", model) for word in SHORTER.get(words[0], ())]
        shown = rlprompt(*words)
        assert shown.code == 0, (command, shown.err)
        ran.append(words[0])
    assert ran == ["doctor", "init", "reward", "forecast", "train", "chat"]
    for name in ("report.html", "artifact/prompt.json", "artifact/README.md"):
        assert (tmp_path / "runs" / "first" / name).is_file()
    assert "How do I keep bread fresh?" in page and shown.out.strip()
