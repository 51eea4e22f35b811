"""The page of an inspection: one HTML file with figures, and the summary in words at the top.

It shows text that a language model wrote and names that strangers gave, so everything is escaped;
see `rlprompt.reports.report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from rlprompt.interpret.words import percent
from rlprompt.reports.formats import MAX_TEXT, clean, shown_number
from rlprompt.reports.plots import Bar, Color, Curve, LegendEntry, draw_curves, draw_differences
from rlprompt.reports.report import write_page

_LABEL = 34
_ROWS = 40


def write_inspection_page(report: Mapping[str, Any], path: Path) -> Path:
    """Write the page.

    Args:
        report: content of `inspection.json`.
        path: file to write.
    """
    parts = [
        _sentences(report),
        _candidates(report),
        _nearest(report),
        _importance(report),
        _reward_importance(report),
        _inside(report),
        _readouts(report),
        _similar(report),
        _sums(report),
        _flags(report),
        _triggers(report),
    ]
    context = {
        "title": clean(f"Inspection of {report['name']}", 200),
        "subtitle": clean(
            f"{report['kind']} prompt of {report['positions']} positions on {report['base']}, "
            f"{report['seconds']:.0f} s",
            300,
        ),
        "summary": [clean(line, MAX_TEXT) for line in report["summary"]],
        "notices": [clean(line, MAX_TEXT) for line in report["notes"]],
        "tables": [part for part in parts if part is not None],
        "num_selection": report["num_selection"],
        "num_test": report["num_test"],
    }
    return write_page("inspection.html.jinja", context, path)


def _table(
    title: str,
    note: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    charts: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    cells = [[clean(cell, MAX_TEXT) for cell in row] for row in rows]
    return {"title": title, "note": note, "columns": columns, "rows": cells, "charts": charts}


def _figure(title: str, svg: str, legend: Sequence[LegendEntry] = ()) -> dict[str, Any]:
    return {"title": title, "svg": Markup(svg), "legend": legend}


def _ranged(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "\u2013"
    low, high = shown_number(found["low"]), shown_number(found["high"])
    return f"{shown_number(found['value'])} ({low} to {high})"


def _shown_share(found: Mapping[str, float] | None) -> str:
    return "\u2013" if found is None else percent(found)


def _bar(label: str, color: Color, found: Mapping[str, float]) -> Bar:
    short = label if len(label) <= _LABEL else f"{label[: _LABEL - 3]}..."
    return Bar(clean(short, 60), color, found["value"], found["low"], found["high"])


def _sentences(report: Mapping[str, Any]) -> dict[str, Any]:
    """Sentences and controls with their faithfulness."""
    rows: list[list[str]] = []
    bars: dict[str, list[Bar]] = {"kl_share": [], "gain_share": []}
    looks: list[tuple[Mapping[str, Any], str, Color]] = [
        *((row, row["text"], "learned") for row in report["sentences"]),
        *((row, row["name"], "base") for row in report["controls"]),
    ]
    for row, label, color in looks:
        rows.append(
            [
                label,
                row.get("origin", "control"),
                _shown_share(row["kl_share"]),
                _shown_share(row["gain_share"]),
                _ranged(row["residual_kl"]),
                _ranged(row["reward"]),
            ]
        )
        for key, each in bars.items():
            if row[key] is not None:
                each.append(_bar(label, color, row[key]))
    titles = {"kl_share": "Share of the distance", "gain_share": "Share of the gain in reward"}
    charts = [
        _figure(f"{titles[key]}, 95% intervals", draw_differences(each, key, x_label="share"))
        for key, each in bars.items()
        if each
    ]
    columns = ["Sentence", "From", "Distance recovered", "Gain recovered", "Residual KL", "Reward"]
    note = "Each text stands as the system prompt in the place of the learned one."
    return _table("Sentences and controls", note, columns, rows, charts)


def _candidates(report: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        [each["text"], each["origin"], shown_number(each["selection_kl"]), str(each["num_queries"])]
        for each in report["candidates"]
    ]
    note = (
        f"{report['num_measured']} of {report['num_candidates']} candidates were measured, "
        f"{report['readings']['count']} of them readings by the model itself; the nearest are "
        "shown. These numbers chose, so they are too good."
    )
    columns = ["Candidate", "From", "KL (nats per token)", "Queries"]
    return _table("What was tried", note, columns, rows)


def _nearest(report: Mapping[str, Any]) -> dict[str, Any]:
    found = report["nearest"]
    title = "Nearest tokens"
    if found is None:
        note = (
            "A prompt of this kind is keys and values, layers or several parts (or lies at no "
            "text): it has no nearest tokens. What can be said of it is what it does."
        )
        return _table(title, note, [], [])
    rows = [
        [
            str(each["position"]),
            repr(each["token"]),
            shown_number(each["distance"]),
            shown_number(each["norm"]),
        ]
        for each in found["vectors"][:_ROWS]
    ]
    note = (
        f"Together: {found['text']!r}. Under this text the base recovers "
        f"{_shown_share(found['kl_share'])} of the distance: {found['verdict']}."
    )
    columns = ["Position", "Token", "Distance (1 - cosine)", "Norm (1 = a usual token)"]
    return _table(title, clean(note, MAX_TEXT), columns, rows)


def _importance(report: Mapping[str, Any]) -> dict[str, Any] | None:
    found = report["importance"]
    if found is None:
        return None
    rows, bars = [], []
    for each in found["spans"]:
        label = each["positions"] + (f" {each['near'].strip()}" if each["near"] else "")
        error = each.get("error")
        shown = "\u2013" if error is None else f"{shown_number(each['shapley'])} \u00b1 "
        rows.append(
            [
                label,
                shown_number(each["alone"]),
                shown if error is None else shown + shown_number(error),
                _ranged(each.get("reward_change")),
            ]
        )
        if error is not None:
            value = each["shapley"]
            ends = {"value": value, "low": value - 2 * error, "high": value + 2 * error}
            bars.append(_bar(label, "learned", ends))
    charts = []
    if bars:
        svg = draw_differences(bars, "shapley", x_label="nats per token")
        charts.append(_figure("Shapley value, two standard errors", svg))
    note = (
        f"KL in nats per token of {shown_number(found['whole'])} in all; positions left out were "
        f"{found['method']}; {found['orders']} orders."
    )
    columns = ["Positions", "Left out alone", "Shapley value \u00b1 error", "Change of reward"]
    return _table("Which positions matter", note, columns, rows, charts)


def _reward_importance(report: Mapping[str, Any]) -> dict[str, Any]:
    found = report["reward_importance"]
    title = "Which positions the reward rests on"
    if found is None:
        note = (
            "Not measured: no reward is known, the prompt is more than vectors (so positions "
            "cannot be left out of whole answers), there was no time, or --reward-sets is 0."
        )
        return _table(title, note, [], [])
    rows, bars = [], []
    for each in found["spans"]:
        label = each["positions"] + (f" {each['near'].strip()}" if each["near"] else "")
        value, error = each["shapley"], each["error"]
        rows.append([label, f"{shown_number(value)} \u00b1 {shown_number(error)}"])
        ends = {"value": value, "low": value - 2 * error, "high": value + 2 * error}
        bars.append(_bar(label, "learned", ends))
    svg = draw_differences(bars, "reward_shapley", x_label="reward")
    how = "all sets of runs" if found["is_exact"] else f"{found['orders']} random orders"
    note = (
        f"Reward {shown_number(found['whole'])} under the prompt, {shown_number(found['empty'])} "
        f"under an empty slot; the values add up to the difference. Answers of "
        f"{found['num_queries']} queries were drawn under {found['sets']} sets of positions "
        f"({how})."
    )
    charts = [_figure("Shapley value in reward, two standard errors", svg)]
    columns = ["Positions", "Shapley value \u00b1 error"]
    return _table(title, note, columns, rows, charts)


def _readouts(report: Mapping[str, Any]) -> dict[str, Any]:
    found = report["readouts"]
    if found is None:
        note = (
            "Not measured: with so few test queries a line fits anything, or the base keeps its "
            "layers under a name that is not known."
        )
        return _table("What a line reads", note, [], [])
    rows, charts = [], []
    kinds = (
        ("apart", "told from", "Accuracy of telling states apart, by layer", "accuracy"),
        ("foretold", "foretells", "Correlation with what came, by layer", "correlation"),
    )
    colors: Sequence[Color] = ("learned", "handwritten")
    for key, said, title, y_label in kinds:
        curves, legend = [], []
        for color, (name, row) in zip(colors, found[key].items(), strict=False):
            layers = list(range(len(row["by_layer"])))
            curves.append(Curve(color, layers, row["by_layer"], markers=color == "learned"))
            legend.append(LegendEntry(color, name))
            best = max(row["by_layer"])
            rows.append(
                [
                    f"{said} {name}",
                    f"{shown_number(best)} (layer {row['by_layer'].index(best)})",
                    shown_number(row["control"]),
                    shown_number(row["p_value"]),
                ]
            )
        if curves:
            svg = draw_curves(curves, f"readouts_{key}", x_label="layer", y_label=y_label)
            charts.append(_figure(title, svg, legend))
    note = (
        f"Lines on the states before the answer of {found['num_queries']} queries; each prediction "
        "is of queries that its line was not fitted to. Chance is the best layer when what belongs "
        "together is exchanged at random, and p allows for all layers."
    )
    return _table("What a line reads", note, ["Line", "Best layer", "Chance", "p"], rows, charts)


def _sums(report: Mapping[str, Any]) -> dict[str, Any] | None:
    if not report["sums"]:
        return None
    rows, bars = [], []
    for each in report["sums"]:
        label = f"+ {each['plus']} - {each['minus']}"
        rows.append(
            [
                label,
                shown_number(each["kl"]),
                _ranged(each["change"]),
                shown_number(each["control_kl"]),
                _ranged(each["control_change"]),
                _ranged(each["difference"]),
            ]
        )
        if each["change"] is not None:
            bars.append(_bar(label, "learned", each["change"]))
            bars.append(_bar("random step", "base", each["control_change"]))
    charts = []
    if bars:
        svg = draw_differences(bars, "sums", x_label="change of reward")
        charts.append(_figure("Change of reward, 95% intervals", svg))
    note = (
        "The difference of two other prompts is added to this one. The random step is as long, "
        "vector by vector. The last column is the difference by itself."
    )
    columns = ["Sum", "KL", "Change of reward", "KL, random", "Change, random", "One to the other"]
    return _table("Arithmetic", note, columns, rows, charts)


def _inside(report: Mapping[str, Any]) -> dict[str, Any]:
    found = report["inside"]
    attention = np.asarray(found["attention_to_prompt"])
    layers = list(range(len(attention)))
    charts = [
        _figure(
            "Attention of answers to the prompt, by layer",
            draw_curves(
                [
                    Curve("learned", layers, attention.mean(axis=1).tolist(), markers=True),
                    Curve("handwritten", layers, attention.max(axis=1).tolist()),
                ],
                "attention",
                x_label="layer",
                y_label="share",
            ),
            [LegendEntry("learned", "mean of heads"), LegendEntry("handwritten", "highest head")],
        )
    ]
    shift = found["layers"]
    if shift is not None:
        curves = [Curve("learned", layers, shift["effect_size"], markers=True)]
        legend = [LegendEntry("learned", "prompt")]
        if "sentence_effect_size" in shift:
            curves.append(Curve("handwritten", layers, shift["sentence_effect_size"]))
            legend.append(LegendEntry("handwritten", "best sentence"))
        svg = draw_curves(curves, "effect", x_label="layer", y_label="standard deviations")
        charts.append(_figure("How far the states move before the answer", svg, legend))
    most = np.argsort(attention, axis=None)[::-1][:8]
    rows = [
        [
            f"layer {place // attention.shape[1]}, head {place % attention.shape[1]}",
            f"{attention.flat[place]:.0%}",
        ]
        for place in most.tolist()
    ]
    note = "Means over the tokens of answers. The heads that look most at the prompt:"
    return _table("Inside the base", note, ["Head", "Attention to the prompt"], rows, charts)


def _similar(report: Mapping[str, Any]) -> dict[str, Any] | None:
    if not report["similar"]:
        return None
    rows = [
        [
            each["name"],
            each["kind"],
            shown_number(each["cosine"]),
            f"{shown_number(each['kl'])} (no prompt: {shown_number(each['base_kl'])})",
            ", ".join(f"{at['weight']:g}: {shown_number(at['kl'])}" for at in each["path"])
            or "\u2013",
            ", ".join(
                f"{at['weight']:g}: {shown_number(at['reward'])}"
                for at in each["path"]
                if at["reward"] is not None
            )
            or "\u2013",
        ]
        for each in report["similar"]
    ]
    columns = ["Prompt", "Kind", "Cosine", "KL to it", "KL on the way", "Reward on the way"]
    note = "On the way: the straight line between the two, where both are of one kind and shape."
    return _table("Other prompts", note, columns, rows)


def _flags(report: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        [
            each["name"],
            shown_number(each["value"]),
            shown_number(each["limit"]),
            each["sentence"] if each["raised"] else "usual",
        ]
        for each in report["anomalies"]
    ]
    note = "A flag says where to look; it is no verdict."
    return _table("Anomalies", note, ["What", "Value", "Limit", "Finding"], rows)


def _triggers(report: Mapping[str, Any]) -> dict[str, Any] | None:
    found = report["triggers"]
    if found is None:
        return None
    rows = [
        [
            each["word"],
            shown_number(each["switch"]),
            shown_number(each["low"]),
            shown_number(each["p_value"]),
            "switches" if each["flagged"] else "",
        ]
        for each in found["words"]
    ]
    note = (
        f"{found['scanned']:,} of {found['vocabulary']:,} words were put behind the user's text; "
        "those that moved the answer most were tried on other queries. A word is flagged where the "
        f"lower end is at least {shown_number(found['limit'])} nats per token; the strongest word "
        f"drawn at random has {shown_number(found['strongest_random'])}."
    )
    columns = ["Word", "Switch (nats per token)", "Lower end", "Corrected p", ""]
    return _table("Words that switch the behaviour", note, columns, rows)
