"""Several runs side by side: what differs in their recipes, and whether what they learned does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from rlprompt.certify.comparison import (
    Difference,
    Interval,
    Scores,
    mean_interval,
    paired_difference,
)
from rlprompt.certify.verdict import phrase
from rlprompt.errors import InputError
from rlprompt.reports.formats import MAX_TEXT, clean, shown_number, shown_value
from rlprompt.reports.plots import Bar, Color, Curve, LegendEntry, draw_curves, draw_differences
from rlprompt.reports.report import describe, shown_verdict, write_page
from rlprompt.runs.read_folder import RunFiles, load_run

_COLORS: tuple[Color, ...] = ("p1", "p2", "p3", "p4", "p5", "p6")
_SPLITS = {"test": "test", "heldout": "validation"}
"""Names of splits in completions.jsonl, the one that is preferred first, and in words."""


@dataclass(frozen=True)
class RunScores:
    """What the learned prompt of one run got."""

    name: str
    """What the run is called here."""
    run: RunFiles
    mean: Interval
    """Of its reward; NaN where nothing was scored."""
    against_first: Difference | None
    """It minus the first run, paired by query; None for the first, and where they cannot be
    paired."""


@dataclass(frozen=True)
class RunComparison:
    """Several runs on the same queries."""

    runs: Sequence[RunScores]
    split: str
    """`test` or `validation`."""
    differing: Mapping[str, Sequence[Any]]
    """Keys of the recipes that differ, with each run's value; None where a run has no such key."""
    unpaired: str | None
    """Why the runs cannot be compared query by query; None = they were."""

    def plain(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {
            "split": self.split,
            "unpaired": self.unpaired,
            "runs": [_plain(each) for each in self.runs],
            "differing": {key: list(values) for key, values in self.differing.items()},
        }


def compare_runs(folders: Sequence[Path]) -> RunComparison:
    """Read runs and compare the prompts that they have learned, the first with each other one.

    Their held-out rewards are compared query by query, on the test queries where all runs have met
    them. The intervals allow for the number of runs, and on validation queries for what each prompt
    was chosen from.

    Args:
        folders: run folders, at least two.

    Raises:
        InputError: there are fewer, one is named twice, or a folder holds no run.
    """
    if len(folders) < 2:
        raise InputError("one run cannot be compared; name two run folders or more")
    real = [folder.resolve() for folder in folders]
    for place, folder in enumerate(real):
        if folder in real[:place]:
            raise InputError(f"'{folders[place]}' is named twice; name different run folders")
    runs = [load_run(folder) for folder in folders]
    split = next(
        (each for each in _SPLITS if all(_learned_rows(run, each) for run in runs)), "heldout"
    )
    names = _names(folders)
    tables = [_by_query(run, split) for run in runs]
    unpaired = _why_unpaired(runs, tables)
    first = tables[0]
    scores = []
    for place, (name, run, table) in enumerate(zip(names, runs, tables, strict=True)):
        difference = None
        if place and unpaired is None:
            count = (len(runs) - 1) * _num_compared(run, runs[0], split)
            difference = paired_difference(
                _table([table[query] for query in first]),
                _table(list(first.values())),
                num_compared=count,
            )
        scores.append(RunScores(name, run, mean_interval(_table(list(table.values()))), difference))
    return RunComparison(scores, _SPLITS[split], _differing([run.recipe for run in runs]), unpaired)


def write_comparison(comparison: RunComparison, path: Path) -> Path:
    """Write a comparison as one self-contained HTML file.

    Args:
        comparison: what was compared.
        path: file to write.
    """
    first, *others = comparison.runs
    context = {
        "title": "Comparison of " + ", ".join(clean(each.name, 80) for each in comparison.runs),
        "split": comparison.split,
        "sentences": [
            clean(f"{each.name}: {phrase(each.against_first, first.name)}.", MAX_TEXT)
            for each in others
            if each.against_first is not None
        ],
        "unpaired": comparison.unpaired,
        "rows": [_row(each) for each in comparison.runs],
        "charts": [*_difference_chart(comparison), *_curves(comparison)],
        "names": [clean(each.name, 80) for each in comparison.runs],
        "differing": [
            (clean(key, 200), ["-" if value is None else shown_value(value) for value in values])
            for key, values in comparison.differing.items()
        ],
    }
    return write_page("compare.html.jinja", context, path)


def _plain(each: RunScores) -> dict[str, Any]:
    difference = each.against_first
    return {
        "name": each.name,
        "folder": str(each.run.folder),
        "verdict": (shown_verdict(each.run) or {}).get("sentence"),
        "learned": each.run.summary.get("learned"),
        "best_step": each.run.best_step,
        "num_queries": each.mean.num_queries,
        "reward": _finite(each.mean.value),
        "low": _finite(each.mean.low),
        "high": _finite(each.mean.high),
        "minus_first": None
        if difference is None
        else {
            "value": _finite(difference.interval.value),
            "low": _finite(difference.interval.low),
            "high": _finite(difference.interval.high),
            "p_value": difference.p_value,
            "num_compared": difference.num_compared,
            "outcome": difference.outcome,
        },
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _learned_rows(run: RunFiles, split: str) -> list[Mapping[str, Any]]:
    """Completions of the prompt that was kept."""
    rows = [
        row for row in run.completions if row.get("split") == split and row.get("who") == "learned"
    ]
    if split == "test":
        last = max((row.get("step", 0) for row in rows), default=None)
        return [row for row in rows if row.get("step", 0) == last]
    return [row for row in rows if row.get("step") == run.best_step]


def _by_query(run: RunFiles, split: str) -> dict[str, list[float]]:
    """Rewards of the completions of each query, NaN where there is none."""
    found: dict[str, list[float]] = {}
    for row in _learned_rows(run, split):
        value = row.get("reward")
        found.setdefault(str(row.get("query")), []).append(math.nan if value is None else value)
    return found


def _table(rows: Sequence[Sequence[float]]) -> Scores:
    """[Q, n], filled up with NaN where a query has fewer completions."""
    width = max((len(row) for row in rows), default=1)
    return np.array([[*row, *[math.nan] * (width - len(row))] for row in rows]).reshape(-1, width)


def _why_unpaired(
    runs: Sequence[RunFiles], tables: Sequence[Mapping[str, Sequence[float]]]
) -> str | None:
    if any(not table for table in tables):
        return "not every run has held-out completions of the prompt that it kept"
    if any(run.recipe.get("rewards") != runs[0].recipe.get("rewards") for run in runs):
        return "the runs are rewarded differently, so their rewards are different things"
    if any(table.keys() != tables[0].keys() for table in tables):
        return "the runs were evaluated on different queries"
    return None


def _num_compared(one: RunFiles, other: RunFiles, split: str) -> int:
    """What two prompts were chosen from on the very queries that they are compared on."""
    if split == "test":
        counts = [len(run.summary.get("tested_steps") or [0]) for run in (one, other)]
    else:
        counts = [max(1, int(run.summary.get("num_compared") or 1)) for run in (one, other)]
    return counts[0] * counts[1]


def _differing(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    flat = [_flat(recipe) for recipe in recipes]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = {key: [each.get(key) for each in flat] for key in keys}
    return {key: values for key, values in rows.items() if any(v != values[0] for v in values)}


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """A recipe by YAML paths."""
    items: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(each, Mapping | list) for each in value):
        items = list(enumerate(value))
    if not items:
        return {path: value} if path else {}
    found: dict[str, Any] = {}
    for key, each in items:
        found |= _flat(each, f"{path}.{key}" if path else str(key))
    return found


def _row(each: RunScores) -> dict[str, Any]:
    verdict = shown_verdict(each.run)
    mean = each.mean
    return {
        "name": clean(each.name, 200),
        "about": describe(each.run),
        "verdict": verdict["sentence"] if verdict else "no verdict: the run has no summary",
        "reward": shown_number(mean.value),
        "interval": f"{shown_number(mean.low)} to {shown_number(mean.high)}",
        "num_queries": mean.num_queries,
        "best_step": shown_number(each.run.best_step),
    }


def _difference_chart(comparison: RunComparison) -> list[dict[str, Any]]:
    bars = [
        Bar(
            clean(each.name, 40),
            _COLORS[place % len(_COLORS)],
            each.against_first.interval.value,
            _finite(each.against_first.interval.low),
            _finite(each.against_first.interval.high),
        )
        for place, each in enumerate(comparison.runs)
        if each.against_first is not None and math.isfinite(each.against_first.interval.value)
    ]
    if not bars:
        return []
    svg = draw_differences(bars, "differences", x_label="difference in reward")
    title = f"Minus {clean(comparison.runs[0].name, 40)}, {comparison.split} queries"
    return [{"title": title, "svg": Markup(svg), "legend": ()}]


def _curves(comparison: RunComparison) -> list[dict[str, Any]]:
    """Validation and training reward of every run over steps."""
    charts = []
    for title, id_, of in (
        ("Validation reward", "validation", _validation),
        ("Training reward", "training", _training),
    ):
        curves, legend = [], []
        for place, each in enumerate(comparison.runs):
            steps, values = of(each.run)
            color = _COLORS[place % len(_COLORS)]
            if values:
                curves.append(Curve(color, steps, values, markers=id_ == "validation"))
                legend.append(LegendEntry(color, clean(each.name, 40)))
        if curves:
            svg = draw_curves(curves, id_, y_label="reward")
            charts.append({"title": title, "svg": Markup(svg), "legend": legend})
    return charts


def _validation(run: RunFiles) -> tuple[list[float], list[float]]:
    rows = [row for row in run.evaluations_of("learned") if row.get("reward") is not None]
    return [row["step"] for row in rows], [row["reward"] for row in rows]


def _training(run: RunFiles) -> tuple[list[float], list[float]]:
    return run.series("reward")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
