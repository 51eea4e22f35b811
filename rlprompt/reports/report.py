"""The report of a run: one HTML file that shows what was learned, drawn from the run folder alone.

It needs no server, no script and no network, so it can be mailed, archived and opened in ten years.
It is also made of text that a language model wrote, hence hostile: everything is escaped, and a
content security policy forbids scripts and requests should an escape ever be missed. A run that
stopped early, or never evaluated, gets the report that its files allow.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlprompt.artifacts.card import started_from
from rlprompt.files import write_atomic
from rlprompt.reading import json_text
from rlprompt.reading.files import read_bytes
from rlprompt.reports.answers import answer_pairs
from rlprompt.reports.candidates import candidate_rows, made_by
from rlprompt.reports.charts import WHO, report_sections
from rlprompt.reports.formats import MAX_TEXT, clean, shown_number, shown_value, signed
from rlprompt.reports.guards import alarm_sentences
from rlprompt.reports.lineage import lineage_charts
from rlprompt.reports.plots import Bar, draw_differences
from rlprompt.runs.read_folder import Row, RunFiles, load_run

_MAX_METRICS = 150
_MAX_RECIPE = 60_000
_TABLE_EXTRAS = {
    "base_logprob": "log-probability under the base (nats per token)",
    "base_kl": "KL to the base (nats per token)",
    "query_information": "information about the query (nats per token)",
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
    return write_page("report.html.jinja", _context(load_run(run_dir)), run_dir / "report.html")


def write_page(template: str, context: Mapping[str, Any], path: Path) -> Path:
    """Fill in a template of this folder, everything escaped, and write the page.

    Args:
        template: name of the template.
        context: what it asks for; a name that is missing is an error.
        path: file to write.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    html = environment.get_template(template).render(context)
    write_atomic(path, html.encode("utf-8", "replace"))
    return path


def _context(run: RunFiles) -> dict[str, Any]:
    tested = run.compared_evaluations(WHO, "test")
    split, shown = ("test", tested) if tested else ("validation", run.compared_evaluations(WHO))
    last = run.metrics[-1] if run.metrics else {}
    return {
        "title": clean(str(run.recipe.get("name") or run.folder.resolve().name), 200),
        "subtitle": _subtitle(run),
        "folder": clean(str(run.folder.resolve()), 500),
        "verdict": shown_verdict(run),
        "notices": _notices(run),
        "cards": _cards(run, shown, split),
        "differences": _differences(run),
        "facts": _facts(run),
        "table": _table(run, shown, split),
        "members": _members(run),
        "candidates": _candidates(run),
        "lineage": lineage_charts(run),
        "sections": report_sections(run),
        "last_step": last.get("step"),
        "last_metrics": [
            (clean(key, 120), shown_number(last[key]))
            for key in sorted(last.keys() - {"step", "time"})[:_MAX_METRICS]
        ],
        **answer_pairs(run),
        "details": _details(run),
        "environment": _environment(run),
        "recipe": clean(run.recipe_text, _MAX_RECIPE),
    }


def _subtitle(run: RunFiles) -> str:
    """What was learned, on which model and which data, how, and when."""
    parts = [describe(run)]
    if run.metrics and run.metrics[-1].get("time"):
        moment = time.gmtime(run.metrics[-1]["time"])
        parts.append(time.strftime("%Y-%m-%d %H:%M UTC", moment))
    parts.append(f"{len(run.metrics)} steps logged")
    return ", ".join(part for part in parts if part)


def describe(run: RunFiles) -> str:
    """Kind of prompt, model, data and method of a run in one line, as far as its recipe says."""
    sections = {name: run.recipe.get(name) for name in ("prompt", "model", "data", "algorithm")}
    prompt, model, data, algorithm = (
        section if isinstance(section, Mapping) else {} for section in sections.values()
    )
    search = run.recipe.get("search")
    method = search.get("type") if isinstance(search, Mapping) else algorithm.get("type")
    parts = []
    if prompt.get("type"):
        size = prompt.get("num_virtual_tokens")
        parts.append(f"{prompt['type']} prompt" + (f" of {size} tokens" if size else ""))
    engine = run.recipe.get("engine")
    if isinstance(engine, Mapping) and engine.get("type") == "endpoint":
        parts.append(f"for {engine.get('model')} behind an endpoint")
    elif model.get("path"):
        parts.append(f"on {PurePath(str(model['path'])).name}")
    if data.get("path"):
        parts.append(f"data {PurePath(str(data['path'])).name}")
    if method:
        parts.append(f"learned by {method}")
    return clean(", ".join(parts), 300)


def shown_verdict(run: RunFiles) -> dict[str, str] | None:
    """The summary's verdict as a sentence, a mood and a note; None where it has none."""
    verdict = run.summary.get("verdict")
    if not isinstance(verdict, Mapping) or not verdict.get("sentence"):
        return None
    mood = str(verdict.get("mood"))
    flat, steps = run.summary.get("steps_without_signal", 0), run.summary.get("steps", 0)
    note = f"Rewards had nothing to teach in {flat} of {steps} steps." if flat else ""
    return {
        "sentence": clean(str(verdict["sentence"]), MAX_TEXT),
        "mood": mood if mood in ("good", "bad") else "neutral",
        "note": note,
    }


def _notices(run: RunFiles) -> list[str]:
    notices = []
    if not run.summary:
        notices.append("This run has no summary.json: it is still going on, or it was cut off.")
    notices += [clean(sentence, MAX_TEXT) for sentence in alarm_sentences(run)]
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


def _cards(run: RunFiles, shown: Mapping[str, Row], split: str) -> list[dict[str, str]]:
    """The mean reward of everyone who is compared; of old runs as far as the summary has it."""
    keys = {"base": "before", "handwritten": "handwritten", "learned": "after"}
    cards = []
    for who, look in WHO.items():
        row = shown.get(who, {})
        value = row.get("reward", run.summary.get(f"heldout_reward_{keys.get(who)}"))
        if value is None:
            continue
        error = row.get("reward_sem")
        cards.append(
            {
                "label": f"{look.label}, {split} reward",
                "color": look.color,
                "value": shown_number(value),
                "error": "" if error is None else shown_number(error),
                "note": _basis(run, row, who),
            }
        )
    return cards


def _basis(run: RunFiles, row: Row, who: str) -> str:
    """What a mean rests on."""
    parts = []
    if row.get("num_queries"):
        parts.append(f"{row['num_queries']} queries")
    if row.get("num_completions"):
        parts.append(f"{row['num_completions']} completions")
    if who == "learned" and run.best_step is not None:
        parts.append(f"step {run.best_step}")
    return ", ".join(parts)


def _differences(run: RunFiles) -> list[dict[str, Any]]:
    """The chart of learned minus everyone else with intervals, as a list of at most one."""
    verdict = run.summary.get("verdict")
    found = verdict.get("differences") if isinstance(verdict, Mapping) else None
    if not isinstance(found, Mapping) or not found:
        return []
    bars = [
        Bar(f"minus {look.label.lower()}", look.color, at["value"], at["low"], at["high"])
        for who, look in WHO.items()
        if who in found and (at := found[who]["interval"])["value"] is not None
    ]
    if not bars:
        return []
    svg = draw_differences(bars, "differences", x_label="difference in reward")
    return [
        {"title": "Learned against the others, 95% intervals", "svg": Markup(svg), "legend": ()}
    ]


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
        (label, shown_value(summary[key]) + unit)
        for label, key, unit in shown
        if summary.get(key) is not None
    ]


def _table(run: RunFiles, shown: Mapping[str, Row], split: str) -> dict[str, Any] | None:
    """The rows of means, one column for each who and one for learned minus base."""
    if not shown:
        return None
    roles = run.reward_roles
    rows: list[dict[str, Any]] = [{"label": "reward", "note": "", "key": "reward", "of": shown}]
    rewards = {who: row.get("rewards") or {} for who, row in shown.items()}
    rows += [
        {"label": clean(name, 120), "note": clean(roles.get(name, ""), 60)}
        | {"key": name, "of": rewards}
        for name in run.reward_names
    ]
    rows += [
        {"label": label, "note": "", "key": key, "of": shown}
        for key, label in _TABLE_EXTRAS.items()
    ]
    lines = []
    for row in rows:
        values = {who: row["of"][who].get(row["key"]) for who in shown}
        if any(value is not None for value in values.values()):
            lines.append(row | {"cells": _cells(values)})
    columns = [WHO[who].label for who in shown]
    if {"base", "learned"} <= shown.keys():
        columns.append("Learned minus base")
    title = f"Means on the {split} queries"
    return {"title": title, "columns": columns, "rows": lines, "note": _table_note(run, split)}


def _table_note(run: RunFiles, split: str) -> str:
    if run.best_step is None:
        return ""
    note = f"Learned: the prompt of step {run.best_step}."
    count = len(run.evaluations_of("learned"))
    if split == "validation" and count > 1:
        note += (
            f" It was kept from {count} evaluations on these queries, so its mean "
            "here is somewhat too good; the verdict allows for that, test queries need not."
        )
    return note


def _cells(values: Mapping[str, float | None]) -> list[str]:
    cells = [shown_number(value) for value in values.values()]
    if {"base", "learned"} <= values.keys():
        base, learned = values["base"], values["learned"]
        if base is None or learned is None:
            cells.append(shown_number(None))
        else:
            cells.append(signed(learned - base))
    return cells


def _members(run: RunFiles) -> list[dict[str, Any]]:
    """One row per member of a population."""
    rows = run.summary.get("members")
    found = rows if isinstance(rows, Mapping) else {}
    return [
        {
            "name": clean(str(name), 120),
            "best": name == run.summary.get("best_member"),
            "cells": [
                shown_number(row.get("heldout_reward_after")),
                shown_number(row.get("best_step")),
                shown_number(row.get("steps")),
                clean(str(row.get("stopped_because") or "not begun"), 200),
            ],
        }
        for name, row in found.items()
        if isinstance(row, Mapping)
    ]


def _candidates(run: RunFiles) -> list[list[str]]:
    """The cells of each candidate of a search: id, text, origin, completions, reward."""
    return [
        [
            shown_value(row.get("id")),
            clean(str(row.get("text") or row.get("kind")), MAX_TEXT),
            clean(made_by(row), 200),
            shown_number(row.get("completions")),
            shown_number(row.get("reward")),
        ]
        for row in candidate_rows(run)
    ]


def _details(run: RunFiles) -> list[tuple[str, str]]:
    labels = {
        "artifact": "Artifact",
        "base_fingerprint_before": "Base fingerprint before",
        "base_fingerprint_after": "Base fingerprint after",
    }
    shown = [
        (label, shown_value(run.summary[key]))
        for key, label in labels.items()
        if run.summary.get(key)
    ]
    return _start(run) + shown


def _start(run: RunFiles) -> list[tuple[str, str]]:
    """Return what the prompt started from, as its card says it; nothing without an artifact."""
    try:
        info = json_text.loads(read_bytes(run.folder / "artifact" / "prompt.json"))
        return [("Started from", clean(started_from(info), MAX_TEXT))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def _environment(run: RunFiles) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key in ("versions", "machine"):
        value = run.summary.get(key)
        if isinstance(value, Mapping):
            found += [(clean(str(name), 80), shown_value(item)) for name, item in value.items()]
        elif value is not None:
            found.append((key, shown_value(value)))
    return found
