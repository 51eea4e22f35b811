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
    "best_text": Who("Best of the texts", "best-text"),
    "start": Who("Start", "start"),
    "learned": Who("Learned", "learned"),
}
"""Whose completions are compared, by their name in the files."""

_PALETTE: tuple[Color, ...] = ("p1", "p2", "p3", "p4", "p5", "p6")
_PHASES: dict[str, Color] = {
    "rollout": "p1",
    "reward": "p2",
    "search": "p3",
    "old_logprobs": "train",
    "reference": "handwritten",
    "teacher": "best-text",
    "prefill": "start",
    "forward": "p3",
    "backward": "p4",
    "optimizer": "p5",
    "ranks": "base",
    "other": "p6",
}
"""Phases in the order of a step. One that is not listed is drawn too, before `other`."""


class _Health(NamedTuple):
    """One chart about the state of policy and prompt."""

    title: str
    unit: str
    keys: tuple[str, ...]


_HEALTH = (
    _Health("KL to the reference", "nats per token", ("kl",)),
    _Health("Entropy", "nats per token", ("entropy",)),
    _Health("Completion length", "tokens", ("completions/mean_length",)),
    _Health("Cut off at the token limit", "share", ("completions/clipped_ratio",)),
    _Health("Gradient norm of the prompt", "norm", ("prompt/grad_norm",)),
    _Health("Norm of the prompt", "norm", ("prompt/norm",)),
    _Health("Drift of the prompt from its start", "norm", ("prompt/drift_from_init",)),
    _Health(
        "Clip ratio",
        "share of tokens",
        ("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"),
    ),
    _Health(
        "Sampling against training",
        "difference in log-probability (nats)",
        ("sampling/sampling_logp_difference/mean",),
    ),
    _Health("Groups without reward spread", "share", ("frac_reward_zero_std",)),
    _Health("Loss", "loss", ("loss",)),
    _Health("Learning rate", "rate", ("lr",)),
    _Health("Reward of the step's best candidate", "reward", ("search/best_reward",)),
    _Health("Candidates of the step", "count", ("search/candidates",)),
)
_MAX_REWARDS = 24


def report_sections(run: RunFiles) -> list[dict[str, Any]]:
    """Draw the curves of a run: sections of `title`, `note`, `layout` and `charts`.

    A chart is a `title`, a `legend` of colours and labels, and an `svg`. What the run did not log
    has no chart; a section may be empty. At most 24 rewards are drawn by themselves. `folded` says
    whether a section waits for a click.
    """
    names = run.reward_names
    note = (
        "Thin line: training mean. Dots: learned prompt on the validation queries. Dashes: base "
        "and written texts there. A reward with the role metric is watched, not trained on."
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
            "standard deviation. Validation: the same queries and draws for all, band of one "
            "standard error over queries.",
            "layout": "wide",
            "charts": [*_train_chart(run), *_heldout_chart(run), *_member_chart(run)],
            "folded": False,
        },
        *({**section, "folded": False} for section in guard_section(run)),
        {
            "title": "Every reward by itself",
            "note": note,
            "layout": "grid",
            "charts": singles,
            "folded": len(singles) < 2,
        },
        {
            "title": "Health of policy and prompt",
            "note": "By training step.",
            "layout": "grid",
            "charts": _health_charts(run),
            "folded": True,
        },
        {
            "title": "Where the time goes",
            "note": "Seconds of each step by phase; the key shows medians.",
            "layout": "wide",
            "charts": _time_chart(run),
            "folded": True,
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
        _chart(
            "Training reward",
            draw_curves([Curve("learned", steps, values, spread)], "train", y_label="reward"),
        )
    ]


def _heldout_chart(run: RunFiles) -> list[dict[str, Any]]:
    curves = _heldout_curves(run, None)
    if not curves:
        return []
    legend = [LegendEntry(curve.color, WHO[who].label.lower()) for who, curve in curves.items()]
    svg = draw_curves(list(curves.values()), "heldout", y_label="reward")
    return [_chart("Validation reward", svg, legend)]


def _member_chart(run: RunFiles) -> list[dict[str, Any]]:
    """The validation reward of every member of a population."""
    curves, legend = [], []
    for place, (name, member) in enumerate(run.members.items()):
        rows = [r for r in member.evaluations_of("learned") if r.get("reward") is not None]
        color = _PALETTE[place % len(_PALETTE)]
        if rows:
            steps, values = [r["step"] for r in rows], [r["reward"] for r in rows]
            curves.append(Curve(color, steps, values, markers=True))
            legend.append(LegendEntry(color, name))
    if not curves:
        return []
    svg = draw_curves(curves, "members", y_label="reward")
    return [_chart("Validation reward of each member", svg, legend)]


def _reward_chart(run: RunFiles, name: str, id_: str) -> list[dict[str, Any]]:
    steps, values = run.series(f"rewards/{name}/mean")
    curves = list(_heldout_curves(run, name).values())
    if values:
        curves.insert(0, Curve("train", steps, values, width=1.0))
    if not curves:
        return []
    role = run.reward_roles.get(name)
    svg = draw_curves(curves, id_, y_label="value")
    return [_chart(f"{name} ({role})" if role else name, svg)]


def _heldout_curves(run: RunFiles, reward: str | None) -> dict[str, Curve]:
    """Return the held-out curve of each who: of the total reward, or of one reward by its name."""
    curves = {}
    for who, shown in WHO.items():
        if who == "start":  # it is where the learned curve begins
            continue
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
    for index, (title, unit, keys) in enumerate(_HEALTH):
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
        charts.append(_chart(title, draw_curves(curves, f"health-{index}", y_label=unit), legend))
    return charts


def _time_chart(run: RunFiles) -> list[dict[str, Any]]:
    found = {key.removeprefix("time/") for row in run.metrics for key in row if "time/" in key[:5]}
    if not found:
        return []
    known = [phase for phase in _PHASES if phase in found and phase != "other"]
    phases = [*known, *sorted(found - _PHASES.keys()), *({"other"} & found)]
    steps = [row["step"] for row in run.metrics]
    parts = {
        phase: Part(_PHASES.get(phase, "p6"), [row.get(f"time/{phase}") for row in run.metrics])
        for phase in phases
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
