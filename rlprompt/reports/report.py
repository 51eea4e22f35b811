"""The report of a run: one HTML file that shows what was learned, drawn from the run folder alone.

It needs no server, no script and no network, so it can be mailed, archived and opened in ten years.
It is also made of text that a language model wrote, hence hostile: everything is escaped, and a
content security policy forbids scripts and requests should an escape ever be missed. A run that
stopped early, or never evaluated, gets the report that its files allow.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlprompt.artifacts.card import started_from
from rlprompt.files import write_atomic
from rlprompt.reports.candidates import candidate_rows, made_by
from rlprompt.reports.charts import WHO, report_sections
from rlprompt.reports.guards import alarm_sentences
from rlprompt.runs.read_folder import Row, RunFiles, load_run

_MAX_PAIRS = 10
_MAX_TEXT = 1500
_MAX_METRICS = 150
_MAX_RECIPE = 60_000
_TABLE_EXTRAS = {
    "base_logprob": "log-probability under the base",
    "base_kl": "KL to the base per token",
    "mean_length": "completion length (tokens)",
    "terminated_share": "share that ended by itself",
}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder, from its files only; overwrites an earlier one.

    Returns:
        The path of the report, which is self-contained and stays below 2 MB.

    Raises:
        InputError: if the folder holds no run, or one of its files is damaged.
    """
    run = load_run(run_dir)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    html = environment.get_template("report.html.jinja").render(_context(run))
    path = Path(run_dir) / "report.html"
    write_atomic(path, html.encode("utf-8", "replace"))
    return path


def _context(run: RunFiles) -> dict[str, Any]:
    best = run.compared_evaluations(WHO)
    last = run.metrics[-1] if run.metrics else {}
    return {
        "title": _clean(str(run.recipe.get("name") or run.folder.resolve().name), 200),
        "subtitle": _subtitle(run),
        "folder": _clean(str(run.folder.resolve()), 500),
        "notices": _notices(run),
        "cards": _cards(run, best),
        "facts": _facts(run),
        "table": _table(run, best),
        "candidates": _candidates(run),
        "sections": report_sections(run),
        "last_step": last.get("step"),
        "last_metrics": [
            (_clean(key, 120), _number(last[key]))
            for key in sorted(last.keys() - {"step", "time"})[:_MAX_METRICS]
        ],
        **_pairs(run, best),
        "details": _details(run),
        "environment": _environment(run),
        "recipe": _clean(run.recipe_text, _MAX_RECIPE),
    }


def _subtitle(run: RunFiles) -> str:
    parts = []
    if run.metrics and run.metrics[-1].get("time"):
        moment = time.gmtime(run.metrics[-1]["time"])
        parts.append(time.strftime("%Y-%m-%d %H:%M UTC", moment))
    parts.append(f"{len(run.metrics)} steps logged")
    return ", ".join(parts)


def _notices(run: RunFiles) -> list[str]:
    notices = []
    if not run.summary:
        notices.append("This run has no summary.json: it is still going on, or it was cut off.")
    notices += [_clean(sentence, _MAX_TEXT) for sentence in alarm_sentences(run)]
    if not run.metrics:
        notices.append("No training step was logged.")
    if not run.evaluations:
        notices.append("No held-out evaluation was logged, so nothing here says what was learned.")
    if run.summary.get("base_fingerprint_before") != run.summary.get("base_fingerprint_after"):
        notices.append(
            "The base model's fingerprint after the run is not the one before it: the base was "
            "changed, or the run ended before it was checked."
        )
    return notices


def _cards(run: RunFiles, best: Mapping[str, Row]) -> list[dict[str, str]]:
    keys = {"base": "before", "handwritten": "handwritten", "learned": "after"}
    cards = []
    for who, shown in WHO.items():
        row = best.get(who, {})
        value = row.get("reward", run.summary.get(f"heldout_reward_{keys[who]}"))
        if value is not None:
            card = {"label": f"Held-out reward, {shown.label.lower()}", "mood": ""}
            card["color"] = shown.color
            error = row.get("reward_sem")
            card |= {"value": _number(value), "error": "" if error is None else _number(error)}
            cards.append(card | {"note": _spread(row, who)})
    if {"base", "learned"} <= best.keys():
        cards += _gain_card(best["base"], best["learned"])
    return cards


def _spread(row: Row, who: str) -> str:
    parts = []
    if row.get("reward_std") is not None:
        parts.append(f"sd {_number(row['reward_std'])}")
    if row.get("num_completions"):
        parts.append(f"{row['num_completions']} completions")
    if who == "learned" and "step" in row:
        parts.append(f"step {row['step']}")
    return ", ".join(parts)


def _gain_card(base: Row, learned: Row) -> list[dict[str, str]]:
    """Return the card of learned minus base; the two samples count as independent."""
    if base.get("reward") is None or learned.get("reward") is None:
        return []
    gain = learned["reward"] - base["reward"]
    card = {"label": "Learned minus base", "color": "line", "mood": "", "value": _signed(gain)}
    errors = [row["reward_sem"] for row in (base, learned) if row.get("reward_sem") is not None]
    if len(errors) < 2:
        return [card | {"error": "", "note": "no standard error was logged"}]
    error = math.hypot(*errors)
    clear = abs(gain) > 2 * error
    card["mood"] = ("good" if gain > 0 else "bad") if clear else ""
    note = "more than two standard errors" if clear else "within two standard errors of zero"
    return [card | {"error": _number(error), "note": note}]


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    shown = (
        ("Steps", "steps", ""),
        ("Time", "seconds", " s"),
        ("Median step", "step_seconds_median", " s"),
        ("Rollout", "completion_tokens_per_second", " tokens/s"),
        ("Peak memory", "peak_rss_mb", " MB"),
        ("Stopped because", "stopped_because", ""),
    )
    summary = run.summary
    return [
        (label, _value(summary[key]) + unit)
        for label, key, unit in shown
        if summary.get(key) is not None
    ]


def _table(run: RunFiles, best: Mapping[str, Row]) -> dict[str, Any] | None:
    """Return the rows of held-out means, one column per who and one for learned minus base."""
    if not best:
        return None
    roles = run.reward_roles
    rows: list[dict[str, Any]] = [{"label": "reward", "note": "", "key": "reward", "of": best}]
    rewards = {who: row.get("rewards") or {} for who, row in best.items()}
    rows += [
        {"label": _clean(name, 120), "note": _clean(roles.get(name, ""), 60)}
        | {"key": name, "of": rewards}
        for name in run.reward_names
    ]
    rows += [
        {"label": label, "note": "", "key": key, "of": best} for key, label in _TABLE_EXTRAS.items()
    ]
    lines = []
    for row in rows:
        values = {who: row["of"][who].get(row["key"]) for who in best}
        if any(value is not None for value in values.values()):
            lines.append(row | {"cells": _cells(values)})
    columns = [WHO[who].label for who in best]
    if {"base", "learned"} <= best.keys():
        columns.append("Learned minus base")
    return {"columns": columns, "rows": lines, "note": _table_note(run, best)}


def _table_note(run: RunFiles, best: Mapping[str, Row]) -> str:
    if "learned" not in best:
        return ""
    note = f"Learned: the prompt of step {best['learned']['step']}."
    count = len(run.evaluations_of("learned"))
    if count > 1 and run.summary.get("heldout_reward_after") is not None:
        note += (
            f" If it was kept as the best of its {count} evaluations on these queries, its reward "
            "is slightly too good; new queries give a fair one."
        )
    return note


def _cells(values: Mapping[str, float | None]) -> list[str]:
    cells = [_number(value) for value in values.values()]
    if {"base", "learned"} <= values.keys():
        base, learned = values["base"], values["learned"]
        if base is None or learned is None:
            cells.append(_number(None))
        else:
            cells.append(_signed(learned - base))
    return cells


def _candidates(run: RunFiles) -> list[list[str]]:
    """Return the cells of each candidate of a search: id, text, origin, completions, reward."""
    return [
        [
            _value(row.get("id")),
            _clean(str(row.get("text") or row.get("kind")), _MAX_TEXT),
            _clean(made_by(row), 200),
            _number(row.get("completions")),
            _number(row.get("reward")),
        ]
        for row in candidate_rows(run)
    ]


def _pairs(run: RunFiles, best: Mapping[str, Row]) -> dict[str, Any]:
    """Return the completions shown side by side: the first ten queries, in the files' order."""
    heldout = [row for row in run.completions if row.get("split") == "heldout"]
    if heldout:
        title = "Held-out completions"
        note = "The first completion of the first ten held-out queries; none was chosen by hand."
    else:
        heldout = [row for row in run.completions if row.get("split") == "train"]
        title = "Training completions of the last step"
        note = "This run has no held-out completions."
    answers = {who: _first_by_query(heldout, who, best.get(who)) for who in WHO}
    queries = list(dict.fromkeys(query for who in reversed(WHO) for query in answers[who]))
    pairs = [
        {
            "query": _clean(query, _MAX_TEXT),
            "answers": [_answer(who, answers[who][query]) for who in WHO if query in answers[who]],
        }
        for query in queries[:_MAX_PAIRS]
    ]
    return {"pairs": pairs, "pairs_title": title, "pairs_note": note}


def _first_by_query(rows: Sequence[Row], who: str, evaluation: Row | None) -> dict[str, Row]:
    """Return the first completion of each query, at the compared step if it was logged."""
    rows = [row for row in rows if row.get("who", "learned") == who]
    steps = {row.get("step", 0) for row in rows}
    wanted = evaluation["step"] if evaluation else None
    step = wanted if wanted in steps else max(steps, default=None)
    first: dict[str, Row] = {}
    for row in rows:
        if row.get("step", 0) == step:
            first.setdefault(str(row.get("query")), row)
    return first


def _answer(who: str, row: Row) -> dict[str, str]:
    label, color = WHO[who]
    parts = [f"{name} {_number(value)}" for name, value in (row.get("rewards") or {}).items()]
    if row.get("num_tokens"):
        parts.append(f"{row['num_tokens']} tokens")
    if row.get("terminated") is False:
        parts.append("cut off at the token limit")
    return {
        "label": label,
        "color": color,
        "reward": _number(row.get("reward")),
        "text": _clean(str(row.get("completion", "")), _MAX_TEXT),
        "parts": _clean(", ".join(parts), 600),
    }


def _details(run: RunFiles) -> list[tuple[str, str]]:
    labels = {
        "artifact": "Artifact",
        "base_fingerprint_before": "Base fingerprint before",
        "base_fingerprint_after": "Base fingerprint after",
    }
    shown = [
        (label, _value(run.summary[key])) for key, label in labels.items() if run.summary.get(key)
    ]
    return _start(run) + shown


def _start(run: RunFiles) -> list[tuple[str, str]]:
    """Return what the prompt started from, as its card says it; nothing without an artifact."""
    try:
        info = json.loads((run.folder / "artifact" / "prompt.json").read_bytes())
        return [("Started from", _clean(started_from(info), _MAX_TEXT))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def _environment(run: RunFiles) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key in ("versions", "machine"):
        value = run.summary.get(key)
        if isinstance(value, Mapping):
            found += [(_clean(str(name), 80), _value(item)) for name, item in value.items()]
        elif value is not None:
            found.append((key, _value(value)))
    return found


def _value(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return _number(value) if number else _clean(str(value), 500)


def _number(value: float | None) -> str:
    """Write a number for a reader: integers whole, others with three decimals or digits."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.1f}"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.3g}"


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "") + _number(value)


def _clean(text: str, limit: int) -> str:
    """Drop control characters, which HTML has no form for, and cut what is too long to read."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    if len(text) > limit:
        text = f"{text[:limit].rstrip()} ... ({len(text) - limit:,} more characters)"
    return text
