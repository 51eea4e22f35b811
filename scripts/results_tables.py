"""Tables of docs/results.md that put several runs beside each other."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

Row = dict[str, Any]


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
        "Filled by `python scripts/compare.py`; every method may train for this many CPU seconds "
        "on one thread. Learned = the prompt after the last step, not chosen by held-out reward. "
        "Mean ± standard deviation over seeds; KL(prompt || base) per token on held-out "
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
    label = {"base": "base", "handwritten": "hand-written"}[who]
    rewards = spread([row[f"heldout_reward_{who}"] for row in rows])
    kls = spread([row["heldout"][who]["base_kl"] for row in rows])
    return f"| {label} | {', '.join(str(row['seed']) for row in rows)} | {rewards} | {kls} | 0 |"


def _mean(rows: list[Row]) -> float:
    return statistics.fmean(row["heldout_reward_learned"] for row in rows)
