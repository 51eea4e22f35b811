"""Answers under several prompts to the same queries, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlprompt.reports.charts import WHO
from rlprompt.reports.formats import MAX_TEXT, clean, shown_number
from rlprompt.runs.read_folder import Row, RunFiles

_MAX_PAIRS = 10
_SHOWN = ("base", "handwritten", "best_text", "learned")
"""Whose answers stand beside each other. Those of the start often are those of a written text."""
_SPLITS = {
    "test": "Answers to test queries",
    "heldout": "Answers to validation queries",
    "train": "Training completions of the last step",
}


def answer_pairs(run: RunFiles) -> dict[str, Any]:
    """The first ten queries with an answer under each prompt, in the files' order: none is chosen.

    Of the test queries where they were met, else of the validation queries, else of the last
    training step. Keys: `pairs`, `pairs_title`, `pairs_note`.
    """
    found = {str(row.get("split")) for row in run.completions}
    split = next((name for name in _SPLITS if name in found), "train")
    rows = [row for row in run.completions if row.get("split") == split]
    best = run.compared_evaluations(_SHOWN)
    answers = {
        who: _first_by_query(rows, who, None if split == "test" else best.get(who))
        for who in _SHOWN
    }
    queries = list(dict.fromkeys(query for who in reversed(_SHOWN) for query in answers[who]))
    pairs = [
        {
            "query": clean(query, MAX_TEXT),
            "answers": [
                _answer(who, answers[who][query]) for who in _SHOWN if query in answers[who]
            ],
        }
        for query in queries[:_MAX_PAIRS]
    ]
    note = (
        "This run has no held-out completions."
        if split == "train"
        else "The first completion of the first queries; none was chosen by hand."
    )
    return {"pairs": pairs, "pairs_title": _SPLITS[split], "pairs_note": note}


def _first_by_query(rows: Sequence[Row], who: str, evaluation: Row | None) -> dict[str, Row]:
    """The first completion of each query, at the compared step if it was logged, else the last."""
    rows = [row for row in rows if row.get("who", "learned") == who]
    steps = {row.get("step", 0) for row in rows}
    wanted = evaluation["step"] if evaluation else None
    step = wanted if wanted in steps else max(steps, default=None)
    first: dict[str, Row] = {}
    for row in rows:
        if row.get("step", 0) == step:
            first.setdefault(str(row.get("query")), row)
    return first


def _answer(who: str, row: Mapping[str, Any]) -> dict[str, str]:
    label, color = WHO[who]
    parts = [f"{name} {shown_number(value)}" for name, value in (row.get("rewards") or {}).items()]
    if row.get("num_tokens"):
        parts.append(f"{row['num_tokens']} tokens")
    if row.get("terminated") is False:
        parts.append("cut off at the token limit")
    return {
        "label": label,
        "color": color,
        "reward": shown_number(row.get("reward")),
        "text": clean(str(row.get("completion", "")), MAX_TEXT),
        "parts": clean(", ".join(parts), 600),
    }
