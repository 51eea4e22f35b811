"""The report's section about reward hacking: proxy against gold over KL, and what guards found."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from rlprompt.evaluation.values import value_of
from rlprompt.reports.plots import Curve, LegendEntry, draw_curves
from rlprompt.runs.read_folder import Row, RunFiles

_BINS = 12
"""Points of the over-optimisation curve: means over equal numbers of steps in order of KL."""


class _Pair(NamedTuple):
    """Both rewards of one batch or evaluation."""

    kl: float | None
    """KL to the reference; None where none was logged."""
    proxy: float
    gold: float


class _Point(NamedTuple):
    """Proxy and gold at one place of the over-optimisation curve."""

    x: float
    proxy: float
    gold: float


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
    pairs = _pairs(run, guard, proxy, gold)
    if len(pairs) < 2:
        return []
    over_kl = all(pair.kl is not None for pair in pairs)
    points = _binned(
        [
            _Point(step if pair.kl is None or not over_kl else pair.kl, pair.proxy, pair.gold)
            for step, pair in enumerate(pairs)
        ]
    )
    x = [point.x for point in points]
    curves = [
        Curve("learned", x, _changes([point.proxy for point in points]), markers=True),
        Curve("handwritten", x, _changes([point.gold for point in points]), markers=True),
    ]
    label = "KL to the reference (nats per token)" if over_kl else "batches"
    return [
        {
            "title": f"{proxy} against {gold}",
            "svg": Markup(draw_curves(curves, name, x_label=label)),
            "legend": [
                LegendEntry("learned", f"proxy: {proxy}"),
                LegendEntry("handwritten", f"gold: {gold}"),
            ],
        }
    ]


def _pairs(run: RunFiles, guard: Mapping[str, Any], proxy: str, gold: str) -> list[_Pair]:
    """Of each batch or evaluation that has both rewards."""
    kl_of = {row["step"]: row.get("kl") for row in run.metrics}
    if guard.get("split") == "heldout":
        found = [
            (kl_of.get(row["step"]), value_of(row, proxy), value_of(row, gold))
            for row in run.evaluations_of("learned")
        ]
    else:
        found = [(row.get("kl"), _trained(row, proxy), _trained(row, gold)) for row in run.metrics]
    return [_Pair(kl, p, g) for kl, p, g in found if p is not None and g is not None]


def _trained(row: Row, reward: str) -> float | None:
    value: float | None = row.get("reward" if reward == "reward" else f"rewards/{reward}/mean")
    return value


def _binned(points: Sequence[_Point]) -> list[_Point]:
    """Means over at most `_BINS` equal numbers of points, in order of `x`."""
    ordered = sorted(points)
    count = min(_BINS, len(ordered))
    edges = [round(i * len(ordered) / count) for i in range(count + 1)]
    parts = [ordered[start:end] for start, end in itertools.pairwise(edges)]
    return [
        _Point(
            statistics.fmean(point.x for point in part),
            statistics.fmean(point.proxy for point in part),
            statistics.fmean(point.gold for point in part),
        )
        for part in parts
    ]


def _changes(values: Sequence[float]) -> list[float | None]:
    spread = statistics.pstdev(values) or 1.0
    return [(value - values[0]) / spread for value in values]
