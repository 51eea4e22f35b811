"""The recorded terminal session of README: the picture shows what was printed, and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from scripts.record_session import COLUMNS, draw, folded, record, shown
from tests.docs.pages import DOCS
from tests.docs.test_commands import fault

RECORDING = DOCS / "figures" / "session.json"
TEXT = "{http://www.w3.org/2000/svg}text"


def recording() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RECORDING.read_text(encoding="utf-8"))
    return found


def test_the_picture_is_drawn_from_the_recording() -> None:
    svg = (DOCS / "figures" / "session.svg").read_text(encoding="utf-8")
    assert svg == draw(recording()), (
        f"python scripts/record_session.py draw {RECORDING.relative_to(DOCS.parent)} "
        "docs/figures/session.svg"
    )
    texts = [each.text for each in ElementTree.fromstring(svg).iter(TEXT)]
    assert [text for text in texts if text and text.startswith("$ ")] == [
        f"$ {entry['command']}" for entry in recording()
    ]


def test_what_was_recorded_ended_well_and_can_be_typed_today() -> None:
    for entry in recording():
        assert entry["code"] == 0 and fault(entry["command"]) is None, entry["command"]
    assert [entry["command"].split()[1] for entry in recording()] == ["init", "train", "chat"]


def test_a_recording_holds_lines_as_a_terminal_shows_them(tmp_path: Path) -> None:
    code = r"import sys; print('\x1b[1mbold\x1b[0m <&>'); print('1%\r2%'); sys.exit(3)"
    (entry,) = record([f'"{sys.executable}" -c "{code}"'], tmp_path)
    assert [text for _, text in entry["lines"]] == ["bold <&>", "2%"]
    assert entry["code"] == 3 and 0 <= entry["lines"][0][0] <= entry["seconds"]


def test_what_is_left_out_is_said() -> None:
    lines = [[0.1 * i, f"line {i} <&>"] for i in range(1, 11)]
    entry: dict[str, Any] = {"command": "seq 10", "lines": lines, "seconds": 1.0, "code": 0}
    entry["show"] = [[1, 2], [4, 4]]
    rows = shown(entry)
    assert [text for _, text in rows] == [
        "$ seq 10",
        "line 1 <&>",
        "line 2 <&>",
        "  ... 1 more line ...",
        "line 4 <&>",
        "  ... 6 more lines ...",
    ]
    svg = draw([entry])
    assert [each.text for each in ElementTree.fromstring(svg).iter(TEXT)] == [t for _, t in rows]
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    for wrong in ([[3, 4], [4, 5]], [[1, 11]]):
        with pytest.raises(SystemExit, match="not in order"):
            shown(entry | {"show": wrong})


def test_long_lines_are_folded_at_spaces() -> None:
    assert [len(piece) for piece in folded("x" * (COLUMNS + 1))] == [COLUMNS, 1]
    text = "word " * 60
    assert " ".join(folded(text)) == text.rstrip() and max(map(len, folded(text))) <= COLUMNS
    assert folded("") == [""]
