"""Which curves a report shows, and from which rows of the run folder they are drawn."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from rlprompt.reports.guards import guard_section
from rlprompt.reports.plots import Color, Curve, LegendEntry, Part, draw_curves, draw_stack
from rlprompt.runs.read_folder import RunFiles


class Who(NamedTuple):
    """How one of those whose completions are compared appears on the page."""

    label: str
    color: Color


WHO: dict[str, Who] = {
    "base": Who("Base", "base"),
    "handwritten": Who("Hand-written", "handwritten"),
    "learned": Who("Learned", "learned"),
}
"""Whose completions are compared, by their name in the files."""

_PALETTE: tuple[Color, ...] = ("p1", "p2", "p3", "p4", "p5", "p6")
_PHASES: dict[str, Color] = {
    "rollout": "p1",
    "reward": "p2",
    "search": "p3",  # no run has both this and the next one
    "forward": "p3",
    "backward": "p4",
    "optimizer": "p5",
    "other": "p6",
}
_HEALTH: dict[str, tuple[str, ...]] = {
    "KL to the reference": ("kl",),
    "Entropy": ("entropy",),
    "Completion length (tokens)": ("completions/mean_length",),
    "Share cut off at the token limit": ("completions/clipped_ratio",),
    "Gradient norm of the prompt": ("grad_norm",),
    "Norm of the prompt": ("prompt/norm",),
    "Drift of the prompt from its start": ("prompt/drift_from_init",),
    "Clip ratio": ("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"),
    "Sampling log-prob difference": ("sampling/sampling_logp_difference/mean",),
    "Share of groups without reward spread": ("frac_reward_zero_std",),
    "Loss": ("loss",),
    "Learning rate": ("learning_rate",),
    "Reward of the step's best candidate": ("search/best_reward",),
    "Candidates of the step": ("search/candidates",),
}
_MAX_REWARDS = 24


def report_sections(run: RunFiles) -> list[dict[str, Any]]:
    """Draw the curves of a run: sections of `title`, `note`, `layout` and `charts`.

    A chart is a `title`, a `legend` of colours and labels, and an `svg`. What the run did not log
    has no chart; a section may be empty. At most 24 rewards are drawn by themselves.
    """
    names = run.reward_names
    note = (
        "Thin line: training mean. Dots: learned prompt, held-out. Dashes: base and hand-written, "
        "held-out. A reward with the role metric is watched, not trained on."
    )
    if len(names) > _MAX_REWARDS:
        note += f" The first {_MAX_REWARDS} of {len(names)} are shown."
    singles = [
        chart
        for index, name in enumerate(names[:_MAX_REWARDS])
        for chart in _reward_chart(run, name, f"reward-{index}")
    ]
    return [
        {
            "title": "Reward",
            "note": "By training step. Training: mean of the step's completions, band of one "
            "standard deviation. Held-out: the same queries and sampling for all, band of one "
            "standard error.",
            "layout": "wide",
            "charts": [*_train_chart(run), *_heldout_chart(run)],
        },
        *guard_section(run),
        {"title": "Every reward by itself", "note": note, "layout": "grid", "charts": singles},
        {"title": "Policy and prompt", "note": "", "layout": "grid", "charts": _health_charts(run)},
        {
            "title": "Where the time goes",
            "note": "Seconds of each step by phase; the key shows medians.",
            "layout": "wide",
            "charts": _time_chart(run),
        },
    ]


def _chart(title: str, svg: str, legend: Sequence[LegendEntry] = ()) -> dict[str, Any]:
    return {"title": title, "svg": Markup(svg), "legend": legend}


def _train_chart(run: RunFiles) -> list[dict[str, Any]]:
    steps, values = run.series("reward")
    if not values:
        return []
    spread = [row.get("reward_std") for row in run.metrics if row.get("reward") is not None]
    return [
        _chart("Training reward", draw_curves([Curve("learned", steps, values, spread)], "train"))
    ]


def _heldout_chart(run: RunFiles) -> list[dict[str, Any]]:
    curves = _heldout_curves(run, None)
    if not curves:
        return []
    legend = [LegendEntry(curve.color, WHO[who].label.lower()) for who, curve in curves.items()]
    return [_chart("Held-out reward", draw_curves(list(curves.values()), "heldout"), legend)]


def _reward_chart(run: RunFiles, name: str, id_: str) -> list[dict[str, Any]]:
    steps, values = run.series(f"rewards/{name}/mean")
    curves = list(_heldout_curves(run, name).values())
    if values:
        curves.insert(0, Curve("train", steps, values, width=1.0))
    if not curves:
        return []
    role = run.reward_roles.get(name)
    return [_chart(f"{name} ({role})" if role else name, draw_curves(curves, id_))]


def _heldout_curves(run: RunFiles, reward: str | None) -> dict[str, Curve]:
    """Return the held-out curve of each who: of the total reward, or of one reward by its name."""
    curves = {}
    for who, shown in WHO.items():
        rows = run.evaluations_of(who)
        if reward is None:
            values = [row.get("reward") for row in rows]
            spread = [row.get("reward_sem") for row in rows]
        else:
            values = [(row.get("rewards") or {}).get(reward) for row in rows]
            spread = None
        if any(value is not None for value in values):
            steps = [row["step"] for row in rows]
            # Base and hand-written text do not change, so they are measured once.
            level = who != "learned"
            curves[who] = Curve(shown.color, steps, values, spread, markers=True, level=level)
    return curves


def _health_charts(run: RunFiles) -> list[dict[str, Any]]:
    charts = []
    for index, (title, keys) in enumerate(_HEALTH.items()):
        drawn = {key: run.series(key) for key in keys}
        drawn = {key: series for key, series in drawn.items() if series[1]}
        if not drawn:
            continue
        colors: Sequence[Color] = ("learned",) if len(keys) == 1 else _PALETTE
        pairs = list(zip(drawn, colors, strict=False))
        curves = [Curve(color, *drawn[key]) for key, color in pairs]
        legend = (
            [
                LegendEntry(color, key.rpartition("/")[2].removesuffix("_mean"))
                for key, color in pairs
            ]
            if len(keys) > 1
            else []
        )
        charts.append(_chart(title, draw_curves(curves, f"health-{index}"), legend))
    return charts


def _time_chart(run: RunFiles) -> list[dict[str, Any]]:
    found = {key.removeprefix("time/") for row in run.metrics for key in row if "time/" in key[:5]}
    phases = [phase for phase in _PHASES if phase in found]
    if not phases:
        return []
    steps = [row["step"] for row in run.metrics]
    parts = {
        phase: Part(color, [row.get(f"time/{phase}") for row in run.metrics])
        for phase, color in _PHASES.items()
        if phase in phases
    }
    medians = {
        phase: statistics.median([value for value in part.values if value is not None] or [0.0])
        for phase, part in parts.items()
    }
    total = sum(medians.values()) or 1.0
    legend = [
        LegendEntry(part.color, f"{phase} {medians[phase]:.2f} s ({medians[phase] / total:.0%})")
        for phase, part in parts.items()
    ]
    return [_chart("Seconds per step", draw_stack(steps, list(parts.values()), "time"), legend)]
