"""Record commands with what they print, and draw a recording as an SVG that plays once.

    python scripts/record_session.py record session.json --folder DIR "rlprompt ..." "rlprompt ..."
    python scripts/record_session.py draw session.json session.svg [--keep 8]

A recording is JSON: for each command its text, its lines as they were printed (stdout and stderr as
a terminal would show them) with the seconds at which they came, and the exit code. Drawing changes
no text; of a command that prints more than `--keep` lines the middle is left out, as a line says.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

COLUMNS = 100
"""Characters of a line, what commands are told and where longer lines are folded."""
CHARACTER, LINE, MARGIN, BAR = 7.83, 19.0, 18.0, 34.0
"""Width of a character, height of a line, the margin and the window's bar, in SVG units."""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def record(commands: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Run commands one after another in a folder.

    Args:
        commands: lines of a shell.
        folder: where they run.

    Returns:
        For each a mapping with `command`, `lines` of `[seconds, text]`, `seconds`, `code`.
    """
    environment = os.environ | {"COLUMNS": str(COLUMNS), "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
    found = []
    for command in commands:
        start, lines = time.monotonic(), []
        with subprocess.Popen(
            ["bash", "-c", command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                text = ESCAPES.sub("", line.rstrip("\n")).split("\r")[-1].rstrip()
                lines.append([round(time.monotonic() - start, 2), text])
        seconds = round(time.monotonic() - start, 1)
        found.append(
            {"command": command, "lines": lines, "seconds": seconds, "code": process.returncode}
        )
    return found


def shown(entry: dict[str, Any], keep: int) -> list[tuple[str, str]]:
    """The lines of one command as they are drawn, each with its class.

    Args:
        entry: one command of a recording.
        keep: how many lines of its output stay, the first half and the last.

    Returns:
        Pairs of a class of the SVG (`command`, `output`, `gap`) and a text of at most `COLUMNS`.
    """
    rows = [("command", f"$ {entry['command']}")]
    texts = [text for _, text in entry["lines"]]
    first, last = keep // 2, keep - keep // 2
    if len(texts) <= keep:
        head, tail = texts, []
    else:
        head, tail = texts[:first], texts[-last:]
    rows += [("output", piece) for text in head for piece in folded(text)]
    if tail:
        count = len(texts) - keep
        rows.append(("gap", f"  ... {count} more line{'s' * (count > 1)} ..."))
    return rows + [("output", piece) for text in tail for piece in folded(text)]


def folded(text: str) -> list[str]:
    """A line as a terminal of `COLUMNS` characters folds it.

    Args:
        text: characters without a line end.
    """
    return [text[i : i + COLUMNS] for i in range(0, len(text), COLUMNS)] or [""]


def draw(recording: Sequence[dict[str, Any]], keep: int) -> str:
    """The recording as an SVG: commands and lines appear one after another, once.

    Args:
        recording: what `record` gave.
        keep: lines of output of each command.
    """
    rows: list[tuple[str, str]] = []
    for entry in recording:
        rows += [("output", "")] * bool(rows) + shown(entry, keep)
    width = round(2 * MARGIN + COLUMNS * CHARACTER)
    height = round(BAR + 2 * MARGIN + len(rows) * LINE)
    lines, delay = [], 0.4
    for i, (kind, text) in enumerate(rows):
        delay += {"command": 1.2, "output": 0.12, "gap": 0.6}[kind]
        if text:
            y = BAR + MARGIN + (i + 0.75) * LINE
            lines.append(
                f'<text class="{kind}" x="{MARGIN:g}" y="{y:g}" '
                f'style="animation-delay:{delay:.2f}s">{escape(text)}</text>'
            )
    title = escape("; ".join(entry["command"] for entry in recording))
    size = {"width": width, "height": height, "bend": width - 10}
    return TEMPLATE.format(**size, title=title, lines="\n".join(lines))


TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" \
height="{height}" role="img">
<title>A recorded terminal session: {title}</title>
<style>
text {{ font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace;
  white-space: pre; animation: come 0.15s both }}
.command {{ fill: #7ee0a4; font-weight: 600 }} .output {{ fill: #dbe2ee }} .gap {{ fill: #8793a8 }}
@keyframes come {{ from {{ opacity: 0 }} to {{ opacity: 1 }} }}
@media (prefers-reduced-motion: reduce) {{ text {{ animation: none }} }}
</style>
<rect width="{width}" height="{height}" rx="10" fill="#131820"/>
<path d="M0 34 V10 A10 10 0 0 1 10 0 H{bend} A10 10 0 0 1 {width} 10 V34 Z" fill="#1d2430"/>
<circle cx="20" cy="17" r="6" fill="#ec6a5e"/><circle cx="40" cy="17" r="6" fill="#f4bf4f"/>\
<circle cx="60" cy="17" r="6" fill="#61c554"/>
{lines}
</svg>
"""


def main() -> None:
    """Record or draw, as the command line says."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    recorder = kinds.add_parser("record", help="run commands and write what they print")
    recorder.add_argument("recording", type=Path)
    recorder.add_argument("commands", nargs="+")
    recorder.add_argument("--folder", type=Path, default=Path())
    drawer = kinds.add_parser("draw", help="draw a recording")
    drawer.add_argument("recording", type=Path)
    drawer.add_argument("svg", type=Path)
    drawer.add_argument("--keep", type=int, default=8, help="lines of each command (default: 8)")
    asked = parser.parse_args()
    if asked.kind == "record":
        found = record(asked.commands, asked.folder)
        asked.recording.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        sys.exit(any(entry["code"] for entry in found))
    recording = json.loads(asked.recording.read_text(encoding="utf-8"))
    asked.svg.write_text(draw(recording, asked.keep), encoding="utf-8")


if __name__ == "__main__":
    main()
