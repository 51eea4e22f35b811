"""The simulation of what runs keep: its truth, its file, and what the committed figures say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import simulate_selection as simulate
from rlprompt.evaluation.heldout import EvaluationSettings

ROOT = Path(__file__).parents[2]


def test_the_truth_is_the_mean_of_very_many_queries() -> None:
    effects = np.array([0.0, 0.15, -0.2, 0.4])
    drawn = simulate.rewards(effects, 60_000, np.random.default_rng(0)).mean(axis=(1, 2))
    assert simulate.true_means(effects) == pytest.approx(drawn, abs=0.005)


def test_it_writes_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.json"
    monkeypatch.setattr(simulate, "CURVES", {"rises": simulate.CURVES["rises"]})
    monkeypatch.setattr(sys, "argv", ["x", "--json", str(file), "--runs", "2"])
    simulate.main()
    made = json.loads(file.read_text())
    assert {cell["rule"] for cell in made["cells"]} == set(simulate.RULES)
    assert made["default"] in ("highest", "accepted")


def test_the_committed_figures_keep_what_is_stated_and_chose_the_default() -> None:
    made = json.loads((ROOT / "docs" / "results" / "selection.json").read_text())
    assert made["stated_rate"] == 0.05
    assert made["default"] == EvaluationSettings().keep
    assert made["default"] == ("accepted" if made["loss_of_accepted"] <= 0.005 else "highest")
    for cell in made["cells"]:
        if cell["rule"].startswith("accepted"):
            assert cell["false_interval"][0] <= 0.05
