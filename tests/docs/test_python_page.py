"""The code of docs/python.md runs as it stands on the real model, with fewer steps."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import DOCS

STEPS = {
    'prompt="Answer in one short sentence.")\nprint': (
        'prompt="Answer in one short sentence.", training={"steps": 1, "queries_per_step": 2}, '
        'sampling={"max_tokens": 12})\n'
        "print"
    ),
    'training={"steps": 10, "queries_per_step": 4}': (
        'training={"steps": 1, "queries_per_step": 2}, evaluation={"max_queries": 2}, '
        'sampling={"max_tokens": 12}'
    ),
}
"""What keeps the test short: text of the page, and what stands for it."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.model
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_dir: Path) -> None:
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 5
    code = "\n".join(blocks)
    for text, shorter in STEPS.items():
        assert code.count(text) == 1
        code = code.replace(text, shorter)
    for name in ("recipes", "reward_models"):
        shutil.copytree(DOCS.parent / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(compile(code, str(DOCS / "python.md"), "exec"), namespace)
    assert namespace["run"].folder == Path("runs/shorter")
    assert sorted(os.listdir("runs")) == ["run", "shorter"]
    assert (tmp_path / "my_prompt" / "prompt.json").is_file()
    assert set(namespace["scores"]) == {"base", "written", "learned"}
