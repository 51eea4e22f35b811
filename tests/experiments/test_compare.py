"""The comparison's commands are recipes, and its tables hold what was run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments import compare
from experiments import results_tables as tables
from rlprompt.recipe.schema import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("recipe", ["concise", "topics"])
def test_every_cell_is_a_recipe_of_its_method(recipe: str) -> None:
    for name, method in compare.METHODS.items():
        path, overrides = compare.command_of(recipe, method, 2, 90.0)
        made = load_recipe(ROOT / path, overrides)
        algorithm, prompt = name.split("-")
        assert (made.algorithm.type, made.prompt.type) == (algorithm, prompt)
        assert (made.training.max_seconds, made.training.clock, made.seed) == (90.0, "cpu", 2)
        assert made.evaluation.handwritten == compare.best_text(recipe)
        assert any(reward.role == "score" for reward in made.rewards)


def row(method: str, seed: int, reward: float) -> dict[str, Any]:
    held = {"base_kl": 0.25, "rewards": {"r": reward}, "teacher_kl": 0.5}
    return {
        "recipe": "recipes/x/y.yaml",
        "seed": seed,
        "heldout_reward_base": 0.1,
        "heldout_reward_handwritten": 0.2,
        "heldout_reward_learned": reward,
        "kl": 0.5,
        "steps": 7,
        "handwritten": "Be brief.",
        "command": f"rlprompt train {method} seed={seed}",
        "heldout": {"base": held, "handwritten": held, "learned": held},
        "comparison": {"name": "x", "method": method, "seconds": 90.0},
    }


def test_a_comparison_has_a_line_per_method_best_first() -> None:
    lines = tables.comparison_section([row("a", 0, 0.3), row("b", 0, 0.4), row("b", 1, 0.6)])
    table = [line for line in lines if line.startswith("| ")][1:]
    assert table[0] == "| base | 0, 1 | 0.100 ± 0.000 | 0.250 ± 0.000 | 0 |"
    assert table[2] == "| b | 0, 1 | 0.500 ± 0.141 | 0.500 ± 0.000 | 7, 7 |"
    assert table[3] == "| a | 0 | 0.300 | 0.500 | 7 |"
    assert sum(line.startswith("    rlprompt") for line in lines) == 3


def test_a_distillation_says_what_was_kept() -> None:
    one = row("distill", 0, 0.0)
    for who, reward, kl in (
        ("base", 0.2, 0.3), ("handwritten", 0.6, 0.0), ("start", 0.0, 0.2), ("learned", 0.5, 0.05),
    ):  # fmt: skip
        one["heldout"][who] = {"rewards": {"r": reward}, "teacher_kl": kl}
    line = tables.distillation_section([one])[-2]
    assert line.endswith("| 0.3000 | 0.2000 | 0.0500 | 0.200 | 0.600 | 0.500 | 0.75 | - |")
    assert tables.distillation_section([]) == []
