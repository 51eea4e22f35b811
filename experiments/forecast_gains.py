"""Whether `rlprompt forecast` tells where training gains: docs/results/forecast.json and its table.

    python experiments/forecast_gains.py run [--only concise/recipe topics/repetition] [--seconds S]
    python experiments/forecast_gains.py render

Four recipes of the repository, each with three rewards: its own, and two for which the recipe's
start was not written. `run` forecasts a case on training queries, with the recipe's start, the base
and five hand-written texts as prompts, then trains it for `--seconds` CPU seconds on one thread.
The gain is the learned prompt less the start on the recipe's 120 test queries. Cases that are
recorded are skipped. `render` prints the table and the rank correlations.

Fixed before the first run: what is correlated with the gain first of all is the headroom, the best
of n of the start's own completions less their mean. Where the 95% interval of that correlation
includes 0, the forecast is not said to predict how much training gains. The other quantities are
shown beside it, and are three more looks.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlprompt.files import to_json, write_atomic

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ROOT / "docs" / "results" / "forecast.json"
TEXTS = ROOT / "recipes" / "data" / "handwritten.json"
FOLDER = ROOT / "runs" / "forecast"
NUM_TEXTS = 5
_RESAMPLES = 20_000

OWN = "../../reward_models"
"""Seen from a recipe."""
REWARDS: dict[str, dict[str, dict[str, Any] | None]] = {
    "concise": {
        "recipe": None,
        "sentence": {"path": "builtin:sentence"},
        "long": {"path": "builtin:length", "options": {"min": 60, "max": 400, "unit": "tokens"}},
    },
    "persona": {
        "recipe": None,
        "keyword": {"path": "builtin:keyword", "options": {"any_of": ["sea", "ship", "sail"]}},
        "reading": {"path": f"{OWN}/style/reading_level.py:reward"},
    },
    "safety": {
        "recipe": None,
        "compliance": {"path": f"{OWN}/safety/harmful_compliance.py:reward"},
        "relevance": {"path": "builtin:relevance"},
    },
    "topics": {
        "recipe": None,
        "correct": {"path": f"{OWN}/topic_label.py:correct"},
        "repetition": {"path": "builtin:repetition"},
    },
}
"""Target -> reward's name -> the reward; None = the recipe's own."""

Row = dict[str, Any]
QUANTITIES: dict[str, Callable[[Row], float]] = {
    "headroom: best of n less mean": lambda row: row["best_of_n"] - row["means"]["start"],
    "spread within a group": lambda row: row["group_spread"],
    "share of variance between prompts": lambda row: (
        row["shares"]["prompts"] + row["shares"]["prompts by query"]
    ),
    "best written text less start": lambda row: row["gain"],
}
"""What a forecast says -> its value; the first is the one that counts."""


def overrides_of(target: str, name: str) -> list[str]:
    """What forecast and training of a case have in common."""
    reward = REWARDS[target][name]
    own = [] if reward is None else [f"rewards={json.dumps([{**reward, 'name': name}])}"]
    return ["model.threads=1", *own]


def trained_overrides(target: str, name: str, seconds: float) -> list[str]:
    """The overrides of a case's training."""
    return [
        *overrides_of(target, name),
        f"training.max_seconds={seconds:g}",
        "training.clock=cpu",
        "training.steps=100000",
        "evaluation.every=100000",
        "evaluation.completions_per_query=1",
        "evaluation.query_information=false",
        "evaluation.handwritten=null",
    ]


def forecast_case(target: str, name: str) -> tuple[str, dict[str, Any]]:
    """The command, and what `rlprompt forecast --json` says."""
    texts = FOLDER / f"{target}.texts.json"
    texts.parent.mkdir(parents=True, exist_ok=True)
    written = json.loads(TEXTS.read_text(encoding="utf-8"))[target][:NUM_TEXTS]
    texts.write_text(json.dumps(written), encoding="utf-8")
    arguments = [
        "forecast",
        f"recipes/{target}/smollm2_grpo.yaml",
        *overrides_of(target, name),
        *("--texts", str(texts.relative_to(ROOT)), "--queries", "16", "--completions", "4"),
        "--json",
    ]
    command = [sys.executable, "-m", "rlprompt", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return shlex.join(["rlprompt", *arguments]), json.loads(done.stdout)


def train_case(target: str, name: str, seconds: float) -> tuple[str, dict[str, Any]]:
    """The command, and the run's summary."""
    folder = FOLDER / f"{target}-{name}"
    path = f"recipes/{target}/smollm2_grpo.yaml"
    arguments = ["train", path, *trained_overrides(target, name, seconds)]
    resume = ["--auto-resume", "--output", str(folder)]
    subprocess.run([sys.executable, "-m", "rlprompt", *arguments, *resume], cwd=ROOT, check=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return shlex.join(["rlprompt", *arguments]), summary


def run_case(target: str, name: str, seconds: float) -> Row:
    """Forecast, train, and put both beside each other."""
    forecast_command, said = forecast_case(target, name)
    train_command, summary = train_case(target, name, seconds)
    verdict = summary["verdict"]
    started = verdict["differences"].get("start")
    # A run that kept its start has gained nothing, and does not compare it with itself.
    gained = started["interval"] if started else {"value": 0.0, "low": 0.0, "high": 0.0}
    return {
        "case": f"{target}/{name}",
        "forecast": {key: value for key, value in said.items() if key != "signal"},
        "gain": gained["value"],
        "gain_low": gained["low"],
        "gain_high": gained["high"],
        "num_queries": verdict["num_queries"],
        "steps": summary["steps"],
        "verdict": verdict["sentence"],
        "commands": [forecast_command, train_command],
    }


def correlation(values: Sequence[float], gains: Sequence[float]) -> dict[str, float]:
    """Spearman's rank correlation with a 95% percentile interval over resampled cases.

    Args:
        values: what was forecast, one per case, at least three.
        gains: what training reached, one per case.

    Returns:
        Value, ends and p-value; NaN where all cases are alike.
    """
    x, y = np.asarray(values), np.asarray(gains)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return dict.fromkeys(("value", "low", "high", "p_value"), math.nan)
    draws = np.random.default_rng(0).integers(0, len(x), (_RESAMPLES, len(x)))
    # A sample of equal cases has no ranks.
    drawn = [row for row in draws if np.ptp(x[row]) > 0 and np.ptp(y[row]) > 0]
    found = [float(stats.spearmanr(x[row], y[row]).statistic) for row in drawn[:4000]]
    low, high = np.quantile(found, [0.025, 0.975])
    together = stats.spearmanr(x, y)
    return {
        "value": float(together.statistic),
        "low": float(low),
        "high": float(high),
        "p_value": float(together.pvalue),
    }


def correlations(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The rank correlation of every quantity with the gain."""
    gains = [row["gain"] for row in rows]
    return {
        name: correlation([quantity(row["forecast"]) for row in rows], gains)
        for name, quantity in QUANTITIES.items()
    }


def table(rows: Sequence[Row]) -> str:
    """The cases and correlations as Markdown."""
    lines = ["| case | outlook | " + " | ".join(QUANTITIES) + " | gain on test queries |"]
    lines.append("|---" * (len(QUANTITIES) + 3) + "|")
    for row in sorted(rows, key=lambda row: -row["gain"]):
        values = [f"{quantity(row['forecast']):.3f}" for quantity in QUANTITIES.values()]
        gain = f"{row['gain']:+.3f} ({row['gain_low']:.3f} to {row['gain_high']:.3f})"
        lines.append(
            f"| {row['case']} | {row['forecast']['outlook']} | {' | '.join(values)} | {gain} |"
        )
    told = [
        f"{found['value']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"
        for found in correlations(rows).values()
    ]
    lines.append(f"| *rank correlation with the gain* | | {' | '.join(told)} | |")
    return "\n".join(lines)


def page_section() -> list[str]:
    """The section of docs/results.md."""
    rows = read_rows()
    if not rows:
        return []
    first, *_ = correlations(rows).values()
    outcome = "It does." if first["low"] > 0.0 else "It does not."
    return [
        "## What a forecast is worth",
        "",
        "`rlprompt forecast` on 16 training queries, 4 completions each, before the same recipe is "
        "trained for 100 CPU seconds on one thread; the gain is the kept prompt less the start on "
        "the recipe's 120 test queries, with a 95% interval over queries. One seed each. Fixed "
        "before the first run: the forecast is said to tell how much training gains if the rank "
        f"correlation of headroom and gain has an interval above 0. {outcome} "
        f"Rank correlation {first['value']:+.2f}, 95% interval {first['low']:+.2f} to "
        f"{first['high']:+.2f} over resampled cases. Made by `python "
        "experiments/forecast_gains.py run`; all commands are in "
        "[forecast.json](results/forecast.json).",
        "",
        *table(rows).split("\n"),
        "",
    ]


def read_rows() -> list[Row]:
    """The recorded cases."""
    if not NUMBERS.exists():
        return []
    return list(json.loads(NUMBERS.read_text(encoding="utf-8"))["rows"])


def write_rows(rows: Sequence[Row]) -> None:
    """Record the cases and, from three on, the correlations."""
    told = correlations(rows) if len(rows) > 2 else {}
    write_atomic(NUMBERS, to_json({"rows": list(rows), "correlations": told}, indent=1) + "\n")


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "render"))
    cases = [f"{target}/{name}" for target, rewards in REWARDS.items() for name in rewards]
    parser.add_argument("--only", nargs="+", default=cases, choices=cases)
    parser.add_argument("--seconds", type=float, default=100.0)
    options = parser.parse_args()
    if options.what == "run":
        known = {row["case"] for row in read_rows()}
        for case in options.only:
            if case not in known:
                target, _, name = case.partition("/")
                row = run_case(target, name, options.seconds)
                write_rows([*read_rows(), row])
    else:
        sys.stdout.write(table(read_rows()) + "\n")


if __name__ == "__main__":
    main()
