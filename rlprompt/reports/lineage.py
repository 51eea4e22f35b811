"""The report's tree of what a search has tried: what was made from what, and its mean reward.

A candidate stands at the step in which it was first tried and at its mean reward, so the picture
stays readable with hundreds of them: what was dropped early is a cloud of small points, and the
line of ancestors of the prompt that was kept runs through it, each with its number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from rlprompt.reports.plots import Color, Edge, LegendEntry, Node, draw_tree
from rlprompt.runs.read_folder import Row, RunFiles

MOST = 2_000
"""Candidates that are drawn; of more, those that were tried most, and the ancestors."""
_MOST_LABELS = 24
"""Ancestors with a number; of more, those nearest to the prompt that was kept."""


def lineage_charts(run: RunFiles) -> list[dict[str, Any]]:
    """The tree as a chart; none where no candidate was made from another.

    A chart is a `title`, a `legend` of colours and labels, and an `svg`.
    """
    found = run.summary.get("candidates")
    rows = {
        row["id"]: row
        for row in (found if isinstance(found, list) else [])
        if isinstance(row, Mapping) and isinstance(row.get("id"), int) and _is_placed(row)
    }
    if not any(parent in rows for row in rows.values() for parent in _parents(row)):
        return []
    kept = _kept(run)
    line = _ancestors(rows, kept)
    shown = _shown(rows, line)
    labelled = set(line[:_MOST_LABELS])
    places = {row["id"]: place for place, row in enumerate(shown)}
    nodes = [
        Node(
            float(row["first_step"]),
            float(row["reward"]),
            "learned" if row["id"] in line else ("start" if not _parents(row) else "base"),
            str(row["id"]) if row["id"] in labelled else "",
        )
        for row in shown
    ]
    edges = [
        Edge(places[parent], places[row["id"]])
        for row in shown
        for parent in _parents(row)
        if parent in places
    ]
    labels: Mapping[Color, str] = {
        "learned": "the prompt that was kept, and what it was made from",
        "start": "made from nothing before it",
        "base": "others",
    }
    colors = [color for color in labels if any(node.color == color for node in nodes)]
    svg = draw_tree(nodes, edges, "lineage", x_label="first tried in step", y_label="mean reward")
    legend = [LegendEntry(color, labels[color]) for color in colors]
    title = f"Lineage of {len(shown)} candidates"
    if len(rows) > len(shown):
        title += f" of {len(rows)}, the most tried"
    return [{"title": title, "svg": Markup(svg), "legend": legend}]


def _is_placed(row: Row) -> bool:
    values = (row.get("first_step"), row.get("reward"))
    return all(isinstance(each, (int, float)) and math.isfinite(each) for each in values)


def _parents(row: Row) -> Sequence[Any]:
    parents = row.get("parents")
    return parents if isinstance(parents, list) else ()


def _kept(run: RunFiles) -> Any:
    """The candidate whose prompt the run has kept."""
    best = run.best_step
    if best == 0:
        return 0
    steps, incumbents = run.series("search/incumbent")
    chosen = [each for step, each in zip(steps, incumbents, strict=True) if step == best]
    return int((chosen or incumbents or [0])[-1])


def _ancestors(rows: Mapping[Any, Row], kept: Any) -> list[Any]:
    """A candidate and all that it was made from, the nearest first."""
    found, waiting = [], [kept]
    while waiting:
        each = waiting.pop(0)
        if each in rows and each not in found:
            found.append(each)
            waiting += _parents(rows[each])
    return found


def _shown(rows: Mapping[Any, Row], line: Sequence[Any]) -> list[Row]:
    """Those that are drawn, in the order in which they were made."""
    by_trials = sorted(rows.values(), key=lambda row: -(row.get("scored") or 0))
    chosen = {row["id"] for row in by_trials[: max(0, MOST - len(line))]} | set(line)
    return [row for number, row in rows.items() if number in chosen]
