"""Tables of docs/results.md that put several runs beside each other."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import Any

Row = dict[str, Any]
_BEFORE = {"base": "base", "handwritten": "hand-written"}
"""What every method is compared with."""


def spread(values: list[float]) -> str:
    """`mean +- standard deviation`, or the value alone."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def cell(text: str) -> str:
    """A completion as one Markdown table cell; nothing in it is markup."""
    plain = " ".join(text.split())
    for sign in "\\`*_{}[]<>#|~":
        plain = plain.replace(sign, "\\" + sign if sign != "<" else "&lt;")
    return plain


def distillation_section(rows: list[Row]) -> list[str]:
    """Students of a long text: how near they come to it, and what they keep of its reward."""
    if not rows:
        return []
    lines = [
        "## A long system prompt, distilled",
        "",
        "KL(teacher || prompt) per token in nats, on completions that the teacher wrote for "
        "held-out queries. The reward is the first of the recipe's; kept = (student - base) / "
        "(teacher - base). Commands:",
        "",
        *(f"    {row['command']}" for row in rows),
        "",
        "| recipe | seed | KL base | KL before | KL after | reward base | reward teacher | reward "
        "student | kept | CPU seconds of steps |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        held = row["heldout"]
        name = next(iter(held["base"]["rewards"]))
        base, teacher, student = (
            held[who]["rewards"][name] for who in ("base", "handwritten", "learned")
        )
        kept = f"{(student - base) / (teacher - base):.2f}" if teacher > base else "-"
        kls = (f"{held[who]['teacher_kl']:.4f}" for who in ("base", "start", "learned"))
        rewards = (f"{value:.3f}" for value in (base, teacher, student))
        parts = [
            row["recipe"],
            str(row["seed"]),
            *kls,
            *rewards,
            kept,
            str(row.get("budget_seconds") or "-"),
        ]
        lines.append("| " + " | ".join(parts) + " |")
    return [*lines, ""]


def best_section(rows: list[Row]) -> list[str]:
    """Mean reward of every method on every recipe of the comparison, the best of each in bold."""
    means: dict[str, dict[str, float]] = defaultdict(dict)
    for name in sorted({row["comparison"]["name"] for row in rows}):
        mine = [row for row in rows if row["comparison"]["name"] == name]
        seeds = list({row["seed"]: row for row in mine}.values())
        for who, label in _BEFORE.items():
            means[label][name] = statistics.fmean(row[f"heldout_reward_{who}"] for row in seeds)
        for method in {row["comparison"]["method"] for row in mine}:
            means[method][name] = _mean([r for r in mine if r["comparison"]["method"] == method])
    names = sorted({name for found in means.values() for name in found})
    best = {name: max(found.get(name, -math.inf) for found in means.values()) for name in names}
    order = sorted(means, key=lambda m: (m not in _BEFORE.values(), -means[m][names[0]], m))
    lines = [
        "## Which is best where",
        "",
        "Mean held-out reward over seeds at equal time, from the tables under *Compared at equal "
        "time*; the best of each recipe is bold, - was not run. What failed, and why, is in "
        "[log.md](log.md).",
        "",
        f"| method | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for method in order:
        found = means[method]
        cells = (_marked(found[n], best[n]) if n in found else "-" for n in names)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, ""]


def _marked(value: float, best: float) -> str:
    return f"**{value:.3f}**" if value == best else f"{value:.3f}"


def comparison_section(rows: list[Row]) -> list[str]:
    """Methods and representations at equal time, a table per recipe and budget."""
    groups: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["comparison"]["name"], row["comparison"]["seconds"]].append(row)
    lines: list[str] = []
    for (name, seconds), group in sorted(groups.items()):
        lines += _comparison(name, seconds, group)
    return lines


def _comparison(name: str, seconds: float, rows: list[Row]) -> list[str]:
    methods: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        methods[row["comparison"]["method"]].append(row)
    seeds = {row["seed"]: row for row in rows}
    lines = [
        f"## Compared at equal time: {name}, {seconds:g} s",
        "",
        "Filled by `python experiments/compare.py`; every method may train for this many CPU "
        "seconds on one thread. Learned = the prompt after the last step, not chosen by held-out "
        "reward. Mean ± standard deviation over seeds; KL(prompt || base) per token on held-out "
        "completions. Time to make a dataset's targets is not counted.",
        "",
        f"Hand-written, best of those tried on training queries: *{cell(rows[0]['handwritten'])}*",
        "",
        "| method | seeds | reward | KL to base | steps |",
        "|---|---|---|---|---|",
        _fixed("base", list(seeds.values())),
        _fixed("handwritten", list(seeds.values())),
    ]
    order = sorted(methods.items(), key=lambda item: -_mean(item[1]))
    for method, group in order:
        values = (
            method,
            ", ".join(str(row["seed"]) for row in group),
            spread([row["heldout_reward_learned"] for row in group]),
            spread([row["kl"] for row in group]),
            ", ".join(str(row["steps"]) for row in group),
        )
        lines.append("| " + " | ".join(values) + " |")
    return [*lines, "", "Commands:", "", *(f"    {row['command']}" for row in rows), ""]


def _fixed(who: str, rows: list[Row]) -> str:
    label = _BEFORE[who]
    rewards = spread([row[f"heldout_reward_{who}"] for row in rows])
    kls = spread([row["heldout"][who]["base_kl"] for row in rows])
    return f"| {label} | {', '.join(str(row['seed']) for row in rows)} | {rewards} | {kls} | 0 |"


def _mean(rows: list[Row]) -> float:
    return statistics.fmean(row["heldout_reward_learned"] for row in rows)
