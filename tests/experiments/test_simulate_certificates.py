"""The simulation of certificates: its worlds are what they are said to be, and it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import simulate_certificates as simulate

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "certificates.json"


def test_one_candidate_is_wrong_as_often_as_the_binomial_says() -> None:
    cell = simulate.selection(1, 100, "holm")
    most = max(k for k in range(100) if stats.binom.cdf(k, 100, 0.1) <= 0.05)
    assert cell["false_rate"] == pytest.approx(stats.binom.cdf(most, 100, 0.1), abs=1e-3)
    assert cell["power"] == cell["oracle_power"]
    assert cell["power"] == pytest.approx(stats.binom.cdf(most, 100, 0.02), abs=1e-3)


def test_draws_in_a_hypercube_are_binomial_and_independent() -> None:
    drawn = simulate.draw(np.random.default_rng(0), 20, np.array([0.1, 0.1, 0.3]), 5000)
    assert drawn.shape == (5000, 3)
    for column, rate in zip(drawn.T, (0.1, 0.1, 0.3), strict=True):
        counts = np.bincount(column, minlength=21) / 5000
        assert counts == pytest.approx(stats.binom.pmf(np.arange(21), 20, rate), abs=2e-3)
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.05


def test_what_is_committed_has_every_cell_and_none_above_delta() -> None:
    found = json.loads(RESULTS.read_text())
    assert {cell["block"] for cell in found["cells"]} == {n for n, _ in simulate.cells(None)}
    assert found["num_cells"] == len(found["cells"])
    assert found["false_rate_max"] == max(cell["false_rate"] for cell in found["cells"])
    assert found["false_rate_max"] <= found["delta"]
    assert all(cell["worlds"] >= 2000 for cell in found["cells"])
    assert found["naive_rate_k50"] == pytest.approx(0.70, abs=0.02)
    assert found["power_vs_oracle_median"] >= 0.8
