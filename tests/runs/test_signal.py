"""A run that had nothing to learn from says so: in the log, the summary and the report."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprompt.reports.report import write_report
from rlprompt.runs.signal import missing_signal, observe, steps_without_signal, without_signal
from tests.fixtures.runs import tiny_trainer

NAN = float("nan")


@pytest.mark.parametrize(
    ("rewards", "advantages", "found"),
    [
        ([0.5, 0.5, 0.5, 0.5], [0.0] * 4, "constant"),
        ([NAN] * 4, [0.0] * 4, "unscored"),
        ([0.5, 0.5, 0.9, 0.9], [0.0] * 4, "flat_groups"),
        (
            [0.5, 0.5, 0.5, 0.5],
            [0.1, -0.2, 0.3, 0.0],
            "constant",
        ),  # a critic's noise teaches nothing
        ([0.5, 0.6, NAN, 0.5], [0.1, -0.1, 0.0, 0.0], None),
        ([0.5, 0.5, 0.9, 0.9], None, None),  # a search compares candidates
        ([0.5, NAN, NAN, NAN], None, None),
    ],
)
def test_why_a_batch_teaches_nothing(
    rewards: list[float], advantages: list[float] | None, found: str | None
) -> None:
    made = None if advantages is None else torch.tensor(advantages)
    assert missing_signal(torch.tensor(rewards), made) == found


def test_steps_in_a_row_are_said_ever_more_rarely(caplog: pytest.LogCaptureFixture) -> None:
    state: dict[str, Any] = {}
    with caplog.at_level(logging.WARNING):
        for step in range(1, 42):
            observe("constant", state, step)
    told = [record.getMessage().split(":")[0] for record in caplog.records]
    assert told == ["step 5", "step 10", "step 20", "step 40"]
    assert "rlprompt reward check" in caplog.text
    assert without_signal(state) == "every completion got one and the same reward in all 41 steps"
    observe(None, state, 42)
    assert without_signal(state) is None and steps_without_signal(state) == 41
    assert without_signal({}) is None


REWARDS = {
    "constant": "    return [0.5] * len(completions)",
    "unscored": "    return [None] * len(completions)",
}


@pytest.mark.parametrize("kind", list(REWARDS))
@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "rloo"])
def test_a_run_without_any_signal_says_so(kind: str, algorithm: str, tmp_path: Path) -> None:
    code = f"def reward(completions, **columns):\n{REWARDS[kind]}\n"
    (tmp_path / "flat.py").write_text(code)
    run = tiny_trainer(
        tmp_path,
        tmp_path / "run",
        rewards=[{"path": "flat.py:reward", "name": "flat"}],
        algorithm={"type": algorithm},
        evaluation={"handwritten": "Use many vowels."},
    )
    summary = run.run()
    assert summary["learned"] is False and summary["steps_without_signal"] == summary["steps"] == 3
    sentence = summary["verdict"]["sentence"]
    assert sentence.startswith("Nothing was learned, because ") and "in all 3 steps" in sentence
    assert sentence.split(".")[0] in write_report(tmp_path / "run").read_text().replace(
        "&#39;", "'"
    )
    assert sentence.split(".")[0] in (tmp_path / "run" / "artifact" / "README.md").read_text()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["learned"] is False


def test_signal_counts_survive_a_resume(tmp_path: Path) -> None:
    (tmp_path / "flat.py").write_text(
        "def reward(completions, **c):\n    return [1.0] * len(completions)\n"
    )
    rewards = [{"path": "flat.py:reward", "name": "flat"}]
    training = {"steps": 4, "save_every": 1}
    first = tiny_trainer(tmp_path, tmp_path / "run", rewards=rewards, training=training)
    step = first.parts.learner.step

    def dying(number: int, *args: Any, **kwargs: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return step(number, *args, **kwargs)

    first.parts.learner.step = dying  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.run()
    again = tiny_trainer(tmp_path, tmp_path / "run", rewards=rewards, training=training)
    assert again.run(resume=True)["steps_without_signal"] == 4
