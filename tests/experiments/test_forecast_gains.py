"""What the experiment makes of forecasts and gains."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from experiments import forecast_gains
from experiments.forecast_gains import QUANTITIES, REWARDS, ROOT, correlation, correlations, table
from rlprompt.recipe.schema import load_recipe


def row(headroom: float, gain: float) -> forecast_gains.Row:
    said = {
        "outlook": "yes",
        "best_of_n": 0.2 + headroom,
        "means": {"start": 0.2},
        "group_spread": 0.1,
        "shares": {"prompts": 0.1, "prompts by query": 0.2},
        "gain": -gain,
    }
    ends = {"gain": gain, "gain_low": gain - 0.1, "gain_high": gain + 0.1}
    return {"case": f"case {headroom}", "forecast": said, **ends}


def test_ranks_that_agree_and_ranks_that_do_not() -> None:
    values = np.arange(12.0)
    same = correlation(values.tolist(), (values**3).tolist())
    assert same["value"] == pytest.approx(1.0) and same["low"] > 0.9
    other = correlation(values.tolist(), np.random.default_rng(0).permutation(12).tolist())
    assert other["low"] < 0.0 < other["high"]


def test_the_table_has_every_case_the_best_gain_first() -> None:
    rows = [row(0.1 * k, 0.05 * k) for k in range(1, 8)]
    lines = table(rows).splitlines()
    assert len(lines) == 2 + 7 + 1
    assert "case 0.7" in lines[2] and "+0.350 (0.250 to 0.450)" in lines[2]
    found = correlations(rows)
    assert list(found) == list(QUANTITIES)
    assert found["headroom: best of n less mean"]["value"] == pytest.approx(1.0)
    assert math.isnan(found["spread within a group"]["value"])
    assert found["best written text less start"]["value"] == pytest.approx(-1.0)


@pytest.mark.parametrize("target", REWARDS)
def test_every_case_is_a_recipe_that_loads(target: str) -> None:
    for name in REWARDS[target]:
        overrides = forecast_gains.trained_overrides(target, name, 100)
        recipe = load_recipe(ROOT / "recipes" / target / "smollm2_grpo.yaml", overrides)
        assert recipe.training.max_seconds == 100
        assert any(reward.role == "score" for reward in recipe.rewards)


def test_the_recorded_figures_are_those_of_the_rows() -> None:
    recorded = json.loads(forecast_gains.NUMBERS.read_text(encoding="utf-8"))
    assert len(recorded["rows"]) >= 12
    fresh = correlations(recorded["rows"])
    for name, found in recorded["correlations"].items():
        assert fresh[name]["value"] == pytest.approx(found["value"])
