"""The targets and pairs in recipes/data: one per query, and the reward agrees with them."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from experiments.make_targets import everyday, topics

ROOT = Path(__file__).parents[2]
MAKE = {"everyday": everyday, "topics": topics}


def load(path: Path) -> ModuleType:
    """A reward model, which belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict[str, Any]]:
    path = ROOT / "recipes" / "data" / f"{name}.jsonl"
    return [json.loads(line) for line in path.open(encoding="utf-8")]


@pytest.mark.parametrize("name", MAKE)
def test_the_file_is_what_the_script_makes(name: str) -> None:
    made = rows(f"{name}_targets")
    assert made == MAKE[name]()
    plain = [{k: v for k, v in row.items() if k not in ("completion", "rejected")} for row in made]
    assert plain == rows(name)


def test_short_answers_are_worth_more_than_rambling_ones() -> None:
    score = load(ROOT / "reward_models" / "concise.py").score
    pairs = [
        [score(row["query"], row[side], 25) for side in ("completion", "rejected")]
        for row in rows("everyday_targets")
    ]
    assert all(good > bad for good, bad in pairs)
    assert statistics.fmean(good for good, _ in pairs) > 0.6


def test_right_labels_are_worth_more_than_others() -> None:
    reward = load(ROOT / "reward_models" / "topic_label.py").reward
    made = rows("topics_targets")
    labels = [row["label"] for row in made]
    assert reward([row["completion"] for row in made], labels) == pytest.approx([1.0] * len(made))
    assert max(reward([row["rejected"] for row in made], labels)) < 0.5
