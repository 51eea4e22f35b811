"""What a run keeps by its highest validation mean, and what by acceptance, where truth is known.

    python experiments/simulate_selection.py --json docs/results/selection.json

A run is a start and `evaluations` later prompts on the same validation queries, two completions of
each. A query's reward under a prompt lies in [0, 1]: 0.5, a difficulty of its own (standard
deviation 0.3), the prompt's effect after the curve, what the prompt has come to do on this query
alone (a random walk over the evaluations, 0.05 each), and the luck of a draw (0.2), cut to [0, 1].

Curves of the effect: `flat`, `falls`, `slow`, `rises`, `steep`, `late`, and `peak` and `collapse`,
which rise and fall again. Rules, of which `rlprompt` has the first four:

- `highest`: the highest mean, the earlier of equals;
- `accepted`: of those that `certify.succession` accepts against the start, by the number of queries
  on which they are better, the highest mean; `accepted_kept`: each against the one kept before it;
  `accepted_mean`: against the start by the mean, spread 1;
- `any_time`: as `accepted`, by the test that may be looked at after each query;
- `t_test`: as `accepted`, by a paired t-test of the mean, which is exact for normal values only;
- `last`: the last prompt, whatever it scored.

Kill rule, stated before the first run: `accepted` becomes the default of `evaluation.keep` only if
what it keeps is on average over the curves at most 0.005 worse in truth than what `highest` keeps
(40 queries, both numbers of evaluations). Its false rate, `kept a prompt that is not better than
the start`, must be at most 5% in every cell whatever the default is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from rlprompt.certify.acceptance import PairedTest  # noqa: E402
from rlprompt.certify.succession import RESERVE, Against, Succession  # noqa: E402

Array = NDArray[np.float64]
ALPHA = 0.05
DRAWS = 2
BETWEEN, WALK, LUCK = 0.3, 0.05, 0.2
ROUNDING = 1e-9
"""A prompt is better than the start where its true mean is this much above."""

CURVES: dict[str, Callable[[Array], NDArray[Any]]] = {
    "flat": lambda t: 0.0 * t,
    "falls": lambda t: -0.1 * t,
    "slow": lambda t: 0.05 * t,
    "rises": lambda t: 0.15 * t,
    "steep": lambda t: 0.3 * np.minimum(1.0, 2.0 * t),
    "late": lambda t: 0.15 * (t > 0.7),
    "peak": lambda t: 0.15 * np.sin(np.pi * np.minimum(1.0, 1.2 * t)),
    "collapse": lambda t: np.where(t <= 0.5, 0.3 * t, 0.15 - 0.7 * (t - 0.5)),
}
"""Effect of the prompt at a share of the run."""


def rewards(effects: Array, queries: int, draw: np.random.Generator) -> Array:
    """[K + 1, Q, n] rewards of the start and K later prompts."""
    ease = 0.5 + draw.normal(0.0, BETWEEN, queries)
    walk = np.cumsum(draw.normal(0.0, WALK, (len(effects), queries)), axis=0)
    walk -= walk[0]
    luck = draw.normal(0.0, LUCK, (len(effects), queries, DRAWS))
    means = ease + effects[:, None] + walk
    return np.asarray(np.clip(means[:, :, None] + luck, 0.0, 1.0))


def true_means(effects: Array) -> Array:
    """[K + 1] exact means: of normal values that are cut to [0, 1]."""
    scale = np.sqrt(BETWEEN**2 + LUCK**2 + WALK**2 * np.arange(len(effects)))
    low, high = (0.0 - 0.5 - effects) / scale, (1.0 - 0.5 - effects) / scale
    inside = stats.norm.cdf(high) - stats.norm.cdf(low)
    edges = stats.norm.pdf(high) - stats.norm.pdf(low)
    return np.asarray((0.5 + effects) * inside - scale * edges + stats.norm.sf(high))


def highest(scores: Array) -> int:
    """The highest mean; of equals the earlier."""
    return int(np.argmax(scores.mean(axis=(1, 2))))


def accepted(scores: Array, spread: float | None, against: Against) -> int:
    """Who is kept by the tests that runs use."""
    succession = Succession.announced(len(scores) - 1, ALPHA, spread, against)
    for step in range(1, len(scores)):
        succession.challenge(step, scores[step], scores[succession.opponent])
    return succession.kept


def gated(scores: Array, is_better: Callable[[Array, float], bool]) -> int:
    """The highest mean of those that a test finds better than the start, by Bonferroni."""
    level = ALPHA * (1.0 - RESERVE) / (len(scores) - 1)
    differences = (scores - scores[0]).mean(axis=2)  # [K + 1, Q]
    better = [k for k in range(1, len(scores)) if is_better(differences[k], level)]
    return max(better, key=lambda k: differences[k].mean()) if better else 0


def by_bets(differences: Array, level: float) -> bool:
    """The sign test that may be looked at any time."""
    return PairedTest(level, None, miss_rate=None).update(differences) == "accept"


def by_t(differences: Array, level: float) -> bool:
    """The one-sided paired t-test."""
    count = len(differences)
    t = differences.mean() / (differences.std(ddof=1) / count**0.5)
    return bool(stats.t.sf(t, count - 1) <= level)


RULES: Mapping[str, Callable[[Array], int]] = {
    "highest": highest,
    "accepted": partial(accepted, spread=None, against="start"),
    "accepted_kept": partial(accepted, spread=None, against="kept"),
    "accepted_mean": partial(accepted, spread=1.0, against="start"),
    "any_time": partial(gated, is_better=by_bets),
    "t_test": partial(gated, is_better=by_t),
    "last": lambda scores: len(scores) - 1,
}


def cells_of(curve: str, queries: int, evaluations: int, runs: int, seed: int) -> list[Any]:
    """What each rule keeps in the same worlds of one curve."""
    effects = CURVES[curve](np.linspace(0.0, 1.0, evaluations + 1))
    truth = true_means(effects)
    kept = {name: np.zeros(runs, dtype=np.int64) for name in RULES}
    seen = {name: np.zeros(runs) for name in RULES}
    for run in range(runs):
        draw = np.random.default_rng([seed, evaluations, queries, run])
        scores = rewards(effects, queries, draw)
        gains = scores.mean(axis=(1, 2)) - scores[0].mean()
        for name, rule in RULES.items():
            kept[name][run] = rule(scores)
            seen[name][run] = gains[kept[name][run]]
    rows = []
    for name, places in kept.items():
        gains = truth[places] - truth[0]
        wrong = int(((places > 0) & (gains <= ROUNDING)).sum())
        error = stats.binomtest(wrong, runs).proportion_ci(0.95, "exact")
        rows.append(
            {
                "curve": curve, "queries": queries, "evaluations": evaluations, "rule": name,
                "runs": runs,
                "true_gain": float(gains.mean()),
                "true_gain_error": float(gains.std(ddof=1) / runs**0.5),
                "best_gain": float(truth.max() - truth[0]),
                "reported_above_truth": float((seen[name] - gains).mean()),
                "false_rate": wrong / runs,
                "false_interval": [float(error.low), float(error.high)],
                "kept_start": float((places == 0).mean()),
                "worse_than_start": float((gains < -ROUNDING).mean()),
            }
        )  # fmt: skip
    return rows


def verdict(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that the kill rule asks for."""

    def mean(rule: str, **where: int) -> float:
        found = [
            row["true_gain"]
            for row in cells
            if row["rule"] == rule and all(row[key] == value for key, value in where.items())
        ]
        return float(np.mean(found))

    gains = {
        f"{rule}_{queries}": mean(rule, queries=queries)
        for rule in RULES
        for queries in sorted({row["queries"] for row in cells})
    }
    least = min(row["queries"] for row in cells)
    loss = gains[f"highest_{least}"] - gains[f"accepted_{least}"]
    ours = [row for row in cells if row["rule"].startswith("accepted")]
    return {
        "false_rate_max": max(row["false_rate"] for row in ours),
        "stated_rate": ALPHA,
        "highest_false_rate_max": max(
            row["false_rate"] for row in cells if row["rule"] == "highest"
        ),
        "mean_true_gain": gains,
        "loss_of_accepted": loss,
        "default": "accepted" if loss <= 0.005 else "highest",
    }


def main() -> None:
    """Simulate all cells, print one line each, and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--runs", type=int, default=1_000, help="runs per cell")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    cells: list[dict[str, Any]] = []
    for queries in (40, 160):
        for evaluations in (3, 10):
            for curve in CURVES:
                start = time.perf_counter()
                cells += cells_of(curve, queries, evaluations, given.runs, given.seed)
                rows = [f"{r['rule']} {r['true_gain']:+.3f}" for r in cells[-len(RULES) :]]
                seconds = round(time.perf_counter() - start)
                head = f"{queries} {evaluations} {curve}"
                sys.stdout.write(f"{head}: {', '.join(rows)} ({seconds} s)\n")
                sys.stdout.flush()
    result = {**verdict(cells), "cells": cells}
    given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
