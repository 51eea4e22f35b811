"""The README's "ten lines" are ten lines, and the command under them is content with them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.runs import rlprompt

ROOT = Path(__file__).parents[2]


def source() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(# my_reward\.py\n.*?)```", text, re.DOTALL)
    assert found is not None
    return found.group(1)


def test_writing_a_reward_takes_ten_lines() -> None:
    lines = [line for line in source().splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 10


def test_the_reward_of_the_readme_is_ready_to_train_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text(source(), encoding="utf-8")
    shown = rlprompt("reward", "check", "my_reward.py")
    assert shown.code == 0, shown.out
    assert "ready to train on" in shown.out
