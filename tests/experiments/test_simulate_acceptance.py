"""The simulation of acceptance: its file, its baseline, and what the committed figures say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import simulate_acceptance as simulate

ROOT = Path(__file__).parents[2]
KEYS = {
    "false_accept_rate",
    "stated_rate",
    "power",
    "gepa_false_accept_rate",
    "rollouts_ratio",
    "cells",
}


def test_it_writes_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.json"
    arguments = ["x", "--json", str(file), "--runs", "2", "--candidates", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    simulate.main()
    made = json.loads(file.read_text())
    assert made.keys() == KEYS
    assert {cell["rule"] for cell in made["cells"]} == {"fresh", "reuse", "race", "gepa"}


def test_the_committed_figures_keep_what_is_stated() -> None:
    made = json.loads((ROOT / "docs" / "results" / "acceptance.json").read_text())
    assert made["stated_rate"] == 0.05
    assert made["false_accept_rate"] <= 0.05 < made["gepa_false_accept_rate"]
    assert made["power"] >= 0.8 and made["rollouts_ratio"] <= 1.3
    for cell in made["cells"]:
        if cell["rule"] != "gepa":
            assert cell["false_accept_interval"][1] <= 0.05


def test_testing_on_everything_has_the_power_it_is_charged_for() -> None:
    """The fixed-size test, drawn: about the power and the error rate that its size was made for."""
    queries = round(simulate.testing_on_everything(5, 0.8) / 6)
    rates = {}
    for effect in (0.0, simulate.EFFECT):
        draw = np.random.default_rng(1)
        world = simulate.World(np.array([effect]), draw)
        found = 0
        for _ in range(600):
            ease = world.ease(queries)
            gain = world.rewards(ease, effect) - world.rewards(ease, 0.0)
            found += gain.mean() / (gain.std(ddof=1) / queries**0.5) > 2.326  # 5% / 5
        rates[effect] = found / 600
    assert rates[0.0] <= 0.025 and rates[simulate.EFFECT] == pytest.approx(0.8, abs=0.06)
