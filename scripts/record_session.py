"""Record commands with what they print, and draw a recording as an SVG that plays once.

    python scripts/record_session.py record session.json --folder DIR "rlprompt ..." "rlprompt ..."
    python scripts/record_session.py draw session.json session.svg

A recording is JSON: for each command its text, its lines as they were printed (stdout and stderr as
a terminal would show them) with the seconds at which they came, and the exit code. A command may
get a key `show` by hand: ranges of its lines that are drawn, `[[1, 3], [9, 9]]`. Drawing changes
no text, and says where lines are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

COLUMNS = 116
"""Characters of a line: what commands are told, and where longer lines are folded."""
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
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                text = ESCAPES.sub("", line.decode("utf-8", "replace").rstrip("\r\n"))
                seen = text.split("\r")[-1].rstrip()  # what it was before is written over
                lines.append([round(time.monotonic() - start, 2), seen])
        seconds = round(time.monotonic() - start, 2)
        found.append(
            {"command": command, "lines": lines, "seconds": seconds, "code": process.returncode}
        )
    return found


def shown(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of one command as they are drawn, each with its class.

    Args:
        entry: one command of a recording.

    Returns:
        Pairs of a class of the SVG (`command`, `output`, `gap`) and a text of at most `COLUMNS`.
    """
    texts = [text for _, text in entry["lines"]]
    rows = [("command", f"$ {entry['command']}")]
    done = 0
    for first, last in [*entry.get("show", [[1, len(texts)]]), [len(texts) + 1, len(texts)]]:
        if first <= done or last > len(texts) or first > last + 1:
            raise SystemExit(f"error: `show` of {entry['command']!r} is not in order; mend it")
        if count := first - 1 - done:
            rows.append(("gap", f"  ... {count} more line{'s' * (count > 1)} ..."))
        rows += [("output", piece) for text in texts[first - 1 : last] for piece in folded(text)]
        done = max(done, last)
    return rows


def folded(text: str) -> list[str]:
    """A line in pieces of at most `COLUMNS` characters, cut at spaces where there are any.

    Args:
        text: characters without a line end.
    """
    return textwrap.wrap(text, COLUMNS, replace_whitespace=False) or [""]


def draw(recording: Sequence[dict[str, Any]]) -> str:
    """The recording as an SVG: commands and lines appear one after another, once.

    Args:
        recording: what `record` gave.
    """
    rows: list[tuple[str, str]] = []
    for entry in recording:
        rows += [("output", "")] * bool(rows) + shown(entry)
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
    asked = parser.parse_args()
    if asked.kind == "record":
        found = record(asked.commands, asked.folder)
        asked.recording.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        sys.exit(any(entry["code"] for entry in found))
    recording = json.loads(asked.recording.read_text(encoding="utf-8"))
    asked.svg.write_text(draw(recording), encoding="utf-8")


if __name__ == "__main__":
    main()
