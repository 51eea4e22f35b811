"""The tree of candidates: who is on it, what is marked, and what hostile rows do to it."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rlprompt.reports.lineage import lineage_charts
from rlprompt.runs.read_folder import RunFiles


def row(number: int, parents: list[int], **more: Any) -> dict[str, Any]:
    made = {"id": number, "parents": parents, "first_step": 1 + number // 4, "scored": 4}
    return {**made, "reward": 0.1 * number, "origin": "swap", "text": "<b>", **more}


def run(rows: Any, incumbents: list[float] = [0.0], best: int = 1) -> RunFiles:  # noqa: B006
    metrics = [
        {"step": step, "search/incumbent": value} for step, value in enumerate(incumbents, start=1)
    ]
    summary = {"candidates": rows, "best_step": best}
    return RunFiles(Path("run"), metrics, (), (), summary, {}, "")


def labels(svg: str) -> set[str]:
    return set(re.findall(r">(\d+)</text>", svg))


def test_the_ancestors_of_what_was_kept_are_marked() -> None:
    rows = [row(0, []), row(11, [0]), row(12, [0]), row(13, [11, 12]), row(14, [0]), row(15, [13])]
    (chart,) = lineage_charts(run(rows, [0.0, 13.0, 15.0], best=2))
    ElementTree.fromstring(str(chart["svg"]))
    marked = labels(str(chart["svg"]))
    assert {"0", "11", "12", "13"} <= marked and not {"14", "15"} & marked
    assert chart["title"] == "Lineage of 6 candidates"
    assert [each.color for each in chart["legend"]] == ["learned", "base"]


def test_five_hundred_candidates_stay_readable() -> None:
    draw = random.Random(0)
    rows = [row(0, [], reward=0.3)]
    rows += [
        row(n, [draw.randrange(max(0, n - 30), n)], reward=0.3 + 0.001 * n + draw.gauss(0, 0.05))
        for n in range(1, 500)
    ]
    (chart,) = lineage_charts(run(rows, [499.0]))
    assert len(chart["svg"]) < 250_000
    assert len(labels(str(chart["svg"]))) <= 40
    rows += [row(n, [0]) for n in range(500, 3000)]
    (more,) = lineage_charts(run(rows, [499.0]))
    assert "of 3000, the most tried" in more["title"] and len(more["svg"]) < 900_000


def test_without_parents_there_is_no_tree() -> None:
    assert lineage_charts(run([row(0, []), row(1, [])])) == []
    assert lineage_charts(run([])) == [] and lineage_charts(run(None)) == []


def test_rows_of_another_form_are_passed_over() -> None:
    odd: list[Any] = [
        "text", None, {}, {"id": "x"}, row(1, [0], reward=None), row(2, [0], reward=float("nan")),
        row(3, [0], first_step="one"), row(4, [99, "0", 0]), row(5, []), row(0, [4]),
    ]  # fmt: skip
    odd[-3]["parents"], odd[-2]["parents"] = [99, "0", 0], "none"
    (chart,) = lineage_charts(run(odd, [4.0]))
    assert chart["title"] == "Lineage of 3 candidates"
    assert {"0", "4"} <= labels(str(chart["svg"]))
