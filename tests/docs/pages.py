"""Pages of docs/ that a test writes: compared as they are, or written anew on request.

RLPROMPT_UPDATE_DOCS=1 python -m pytest tests/docs -n 0     writes them
"""

from __future__ import annotations

import os
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
UPDATE = os.environ.get("RLPROMPT_UPDATE_DOCS") == "1"


def code(text: str) -> str:
    """Text as code in a cell of a Markdown table."""
    fence = "``" if "`" in text else "`"
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|")


def check_page(name: str, text: str) -> None:
    """Compare a page with its text, or write it."""
    path = DOCS / name
    if UPDATE:
        path.write_text(text, encoding="utf-8")
    shown = path.read_text(encoding="utf-8") if path.exists() else ""
    assert shown == text, f"docs/{name} is not current; RLPROMPT_UPDATE_DOCS=1 writes it anew"
