"""The card of a preference model: README.md beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlprompt.artifacts.card import cell


def reward_card(summary: Mapping[str, Any]) -> str:
    """Markdown that says what the model is for, what it learned from, and how right it is.

    Args:
        summary: what `train_reward` writes as summary.json.
    """
    counts, pairs = summary["pairs"], summary["heldout_pairs"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-classification",
        "tags: [reward-model, rlprompt, trl]",
        "---",
        "",
        f"# {cell(summary['name'])}: a preference model",
        "",
        f"{cell(summary['description'])}" if summary["description"] else "",
        "",
        f"Learned from {counts['train']} pairs with TRL's RewardTrainer, starting from "
        f"{cell(summary['start'])}; tested on {counts['heldout']} pairs of queries that it never "
        "saw.",
        "",
        "## Held-out results",
        "",
        "| | value | 95% interval | n |",
        "|---|---|---|---|",
        _row("pair accuracy", pairs["accuracy"]),
    ]
    answers = summary["heldout_answers"]
    if answers is not None:
        for name in ("accuracy", "sensitivity", "specificity"):
            lines.append(_row(f"{name}, single answers", answers[name]))
        for rule, found in summary["rules"].items():
            lines += [
                _row(f"{name}, rule {cell(rule)}", found[name])
                for name in ("accuracy", "sensitivity", "specificity")
            ]
    lines += ["", "Bad is the finding: sensitivity is the share of bad answers called bad.", ""]
    lines += _calibration_lines(summary)
    lines += [
        "## Use",
        "",
        "```yaml",
        "rewards:",
        "  - path: builtin:preference",
        "    options: {path: PATH/TO/THIS/FOLDER, activation: sigmoid}",
        "```",
        "",
        "A score is what this model makes of a text, not whether a person would agree: watch it "
        "beside a reward that is not trained on.",
        "",
    ]
    return "\n".join(lines)


def _calibration_lines(summary: Mapping[str, Any]) -> list[str]:
    pairs, answers = summary["heldout_pairs"], summary["heldout_answers"]
    lines = ["| calibration | Brier | ECE |", "|---|---|---|"]
    for name in ("raw", "calibrated"):
        lines.append(f"| pairs, {name} | {pairs[name]['brier']:.3f} | {pairs[name]['ece']:.3f} |")
    if answers is not None:
        lines.append(f"| single answers | {answers['brier']:.3f} | {answers['ece']:.3f} |")
    return [*lines, "", "![reliability](reliability.png)", ""]


def _row(name: str, share: Mapping[str, Any]) -> str:
    interval = f"{share['low']:.3f} to {share['high']:.3f}"
    return f"| {name} | {share['value']:.3f} | {interval} | {share['of']} |"
