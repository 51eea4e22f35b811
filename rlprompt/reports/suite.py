"""The page of an evaluation suite, from the content of evaluation.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rlprompt.reports.formats import MAX_TEXT, clean, shown_number, signed
from rlprompt.reports.plots import Bar, Color, draw_differences
from rlprompt.reports.report import write_page

_MOST_BARS = 40
_SHADE = {"better": "good", "worse": "bad"}

Plain = Mapping[str, Any]


def write_suite_page(report: Plain, path: Path) -> Path:
    """Write an evaluation as one self-contained HTML file.

    Args:
        report: content of evaluation.json.
        path: file to write.
    """
    gate = report["gate"]
    context = {
        "title": f"Evaluation with the suite {clean(str(report['suite']), 80)}",
        "subtitle": clean(
            f"rlprompt {report['rlprompt']}, seed {report['seed']}, suite "
            f"{str(report['suite_hash'])[:12]}",
            300,
        ),
        "artifacts": [
            _artifact(str(name), result, place, None if gate is None else gate["artifacts"][name])
            for place, (name, result) in enumerate(report["artifacts"].items())
        ],
    }
    return write_page("suite.html.jinja", context, path)


def _artifact(name: str, result: Plain, place: int, gate: Plain | None) -> dict[str, Any]:
    rewards = list(result["adherence"]["rewards"])
    about = (
        f"{result['representation']}, base {result['base']}, {result['num_queries']} queries, "
        f"folder {result['artifact'] or '-'}"
    )
    return {
        "name": clean(name, 120),
        "about": clean(about, 400),
        "init_text": clean(str(result["init_text"]), MAX_TEXT),
        "findings": [clean(each, 500) for each in result["findings"]],
        "left_out": [clean(each, 500) for each in result["left_out"]],
        "gate": None if gate is None else _gate(gate),
        "adherence": [
            _reward(reward, result["adherence"]["rewards"][reward]) for reward in rewards
        ],
        "slices": _slices(result),
        "reward_names": [clean(each, 80) for each in rewards],
        "matrix": [_situation(row, rewards) for row in result["situations"]],
        "charts": [*_situation_chart(result, rewards, place), *_measure_chart(result, place)],
        "measures": [_measure(each) for each in result["measures"]],
        "difference": [_change(each) for each in result["difference"]],
        "answers": _answers(result),
    }


def _gate(gate: Plain) -> dict[str, Any]:
    return {
        "passes": gate["passes"],
        "checks": [
            {"passes": each["passes"], "sentence": clean(each["sentence"], 500)}
            for each in gate["checks"]
        ],
    }


def _reward(name: str, row: Plain) -> dict[str, Any]:
    written = row.get("best_written")
    return {
        "name": clean(name, 80),
        "prompt": _interval(row["prompt"]),
        "base": _interval(row["base"]),
        "minus_base": _difference(row["minus_base"]),
        "written": None if written is None else _interval(written),
        "text": "" if written is None else clean(str(written["text"]), 300),
        "minus_written": None if written is None else _difference(row["minus_written"]),
    }


def _slices(result: Plain) -> list[dict[str, Any]]:
    return [
        {
            "reward": clean(name, 80),
            "slice": clean(str(value), 80),
            "prompt": _interval(cells["prompt"]),
            "minus_base": _difference(cells["minus_base"]),
            "count": cells["prompt"]["num_queries"],
        }
        for name, row in result["adherence"]["rewards"].items()
        for value, cells in row["slices"].items()
    ]


def _situation(row: Plain, rewards: Sequence[str]) -> dict[str, Any]:
    cells: list[dict[str, Any] | None] = []
    for name in rewards:
        cell = row["rewards"].get(name)
        if cell is None:
            cells.append(None)
            continue
        cells.append(
            {
                "prompt": shown_number(cell["prompt"]["value"]),
                "change": _difference(cell["change"]),
                "base_change": _signed(cell["base_change"]["value"]),
            }
        )
    return {"name": clean(row["situation"], 80), "cells": cells}


def _measure(measure: Plain) -> dict[str, Any]:
    rows = [
        {
            "name": clean(name, 80),
            "prompt": _interval(number["prompt"]),
            "base": _interval(number["base"]),
            "minus_base": _difference(number["minus_base"], number["higher_is"]),
            "count": number["prompt"]["num_queries"],
        }
        for name, number in measure["numbers"].items()
    ]
    extra = [
        f"{key}: {shown_number(value)}, base {shown_number(measure['extra']['base'].get(key))}"
        for key, value in measure["extra"]["prompt"].items()
    ]
    return {
        "name": clean(measure["measure"], 80),
        "about": clean(measure["about"], 300),
        "rows": rows,
        "extra": [clean(each, 200) for each in extra],
        "answers": [
            {
                "query": clean(str(row.get("query", "")), 500),
                "answer": clean(str(row.get("answer", "")), 700),
                "declines": row.get("declines"),
            }
            for row in measure["rows"]
        ],
    }


def _change(each: Plain) -> dict[str, Any]:
    return {
        "feature": clean(each["feature"], 80),
        "base": shown_number(each["base"]),
        "prompt": shown_number(each["prompt"]),
        "effect": signed(each["effect"]),
        "p_value": shown_number(float(each["p_value"])),
        "is_sure": each["p_value"] <= 0.05,
        "query": clean(each["query"], 300),
        "base_answer": clean(each["base_answer"], 500),
        "prompt_answer": clean(each["prompt_answer"], 500),
    }


def _answers(result: Plain) -> list[dict[str, Any]]:
    rows = [("plain", row) for row in result["adherence"]["rows"][:4]]
    rows += [(each["situation"], row) for each in result["situations"] for row in each["rows"][:1]]
    return [
        {
            "situation": clean(str(name), 80),
            "query": clean(row["query"], MAX_TEXT),
            "answer": clean(row["answer"], MAX_TEXT),
        }
        for name, row in rows
    ]


def _situation_chart(result: Plain, rewards: Sequence[str], place: int) -> list[dict[str, Any]]:
    """Changes of the first reward against the plain situation."""
    if not rewards:
        return []
    name = rewards[0]
    bars = [
        _bar(row["situation"], row["rewards"][name]["change"], "learned")
        for row in result["situations"]
        if row["rewards"][name]["change"]["value"] is not None
    ][:_MOST_BARS]
    if not bars:
        return []
    svg = draw_differences(bars, f"situations-{place}", x_label=f"change in {clean(name, 60)}")
    title = f"{clean(name, 60)}: each situation minus the plain one, bounds that hold together"
    return [{"title": title, "svg": Markup(svg), "legend": ()}]


def _measure_chart(result: Plain, place: int) -> list[dict[str, Any]]:
    """Shares and probabilities against the base, which have one scale."""
    bars = [
        _bar(f"{measure['measure']} {name}", number["minus_base"], "p4")
        for measure in result["measures"]
        for name, number in measure["numbers"].items()
        if number["minus_base"]["value"] is not None
        and _is_share(number["prompt"])
        and _is_share(number["base"])
    ][:_MOST_BARS]
    if not bars:
        return []
    svg = draw_differences(bars, f"measures-{place}", x_label="difference to the base")
    title = "Side effects that are shares: prompt minus base, bounds that hold together"
    return [{"title": title, "svg": Markup(svg), "legend": ()}]


def _is_share(number: Plain) -> bool:
    low, high = number["low"], number["high"]
    return low is not None and high is not None and low >= -0.01 and high <= 1.01


def _bar(label: str, number: Plain, color: Color) -> Bar:
    return Bar(clean(label, 40), color, number["value"], number["low"], number["high"])


def _interval(number: Plain) -> dict[str, str]:
    return {
        "value": shown_number(number["value"]),
        "range": f"{shown_number(number['low'])} to {shown_number(number['high'])}",
    }


def _difference(number: Plain, higher_is: str = "better") -> dict[str, str]:
    """A difference, shaded where it is beyond chance and good or bad."""
    outcome = number.get("outcome")
    if higher_is == "worse":
        outcome = {"better": "worse", "worse": "better"}.get(str(outcome), outcome)
    shade = "" if higher_is == "other" else _SHADE.get(str(outcome), "")
    return {
        "value": _signed(number["value"]),
        "range": f"{_signed(number['low'])} to {_signed(number['high'])}",
        "shade": shade,
    }


def _signed(value: float | None) -> str:
    return shown_number(None) if value is None else signed(value)
