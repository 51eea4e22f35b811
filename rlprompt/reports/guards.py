"""The report's section about reward hacking: proxy against gold over KL, and what guards found."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from rlprompt.reports.plots import Curve, draw_curves
from rlprompt.runs.read_folder import Row, RunFiles

_BINS = 12
"""Points of the over-optimisation curve: means over equal numbers of steps in order of KL."""


def guard_section(run: RunFiles) -> list[dict[str, Any]]:
    """The section as a list of one, or an empty list for a run without guards.

    For each guard that compares a proxy with a gold reward, both are drawn over the KL to the
    reference (over steps where the run logs no KL), as the change from the first point in standard
    deviations of the run, so that rewards of different scales share a picture.
    """
    guards = [each for each in run.recipe.get("guards") or [] if isinstance(each, Mapping)]
    if not guards:
        return []
    charts = [
        chart
        for index, guard in enumerate(guards)
        if guard.get("type") == "parting"
        for chart in _chart(run, guard, f"guard-{index}")
    ]
    note = (
        "The proxy is trained on, the gold reward is only watched. Where gold turns down while the "
        "proxy still rises, the proxy is being hacked (over-optimisation). Each is drawn as its "
        "change in its own standard deviations."
    )
    return [{"title": "Guards", "note": note, "layout": "wide", "charts": charts}]


def alarm_sentences(run: RunFiles) -> list[str]:
    """One sentence per alarm that a guard raised, in order."""
    alarms = run.summary.get("alarms")
    return [
        f"Guard '{each.get('guard')}', step {each.get('step')}: {each.get('reason')}."
        for each in (alarms if isinstance(alarms, list) else [])
        if isinstance(each, Mapping)
    ]


def _chart(run: RunFiles, guard: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    proxy, gold = str(guard.get("proxy")), str(guard.get("gold"))
    rows = _rows(run, guard, proxy, gold)
    if len(rows) < 2:
        return []
    over_kl = all(x is not None for x, _, _ in rows)
    points = _binned([(x if over_kl else step, p, g) for step, (x, p, g) in enumerate(rows)])
    x = [point[0] for point in points]
    curves = [
        Curve("learned", x, _changes([point[1] for point in points]), markers=True),
        Curve("handwritten", x, _changes([point[2] for point in points]), markers=True),
    ]
    label = "KL to the reference (nats per token)" if over_kl else "batches"
    return [
        {
            "title": f"{proxy} against {gold}",
            "svg": Markup(draw_curves(curves, name, x_label=label)),
            "legend": [("learned", f"proxy: {proxy}"), ("handwritten", f"gold: {gold}")],
        }
    ]


def _rows(
    run: RunFiles, guard: Mapping[str, Any], proxy: str, gold: str
) -> list[tuple[float | None, float, float]]:
    """KL (None where there is none), proxy and gold of each batch or evaluation that has both."""
    kl = {row["step"]: row.get("kl") for row in run.metrics}
    if guard.get("split") == "heldout":
        found = [
            (kl.get(row["step"]), _heldout(row, proxy), _heldout(row, gold))
            for row in run.evaluations_of("learned")
        ]
    else:
        found = [(row.get("kl"), _trained(row, proxy), _trained(row, gold)) for row in run.metrics]
    return [(x, p, g) for x, p, g in found if p is not None and g is not None]


def _trained(row: Row, reward: str) -> float | None:
    value: float | None = row.get("reward" if reward == "reward" else f"rewards/{reward}/mean")
    return value


def _heldout(row: Row, reward: str) -> float | None:
    if reward == "reward":
        value: float | None = row.get("reward")
        return value
    value = (row.get("rewards") or {}).get(reward)
    return value


def _binned(
    rows: Sequence[tuple[float | None, float, float]],
) -> list[tuple[float, float, float]]:
    known = sorted((x, p, g) for x, p, g in rows if x is not None)
    count = min(_BINS, len(known))
    edges = [round(i * len(known) / count) for i in range(count + 1)]
    points = []
    for start, end in itertools.pairwise(edges):
        part = known[start:end]
        points.append(
            (
                statistics.fmean(each[0] for each in part),
                statistics.fmean(each[1] for each in part),
                statistics.fmean(each[2] for each in part),
            )
        )
    return points


def _changes(values: Sequence[float]) -> list[float | None]:
    spread = statistics.pstdev(values) or 1.0
    return [(value - values[0]) / spread for value in values]
