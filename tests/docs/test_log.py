"""The notebook of attempts has one form, and its contents name every entry."""

from __future__ import annotations

import re

from tests.docs.pages import DOCS

TEXT = (DOCS / "log.md").read_text(encoding="utf-8")
BEFORE, ENTRIES = TEXT.split("\n## Contents\n", 1)
PARTS = ("- Tried", "- Goal", "- Numbers", "- Outcome")
OPTIONAL = {"- Goal", "- Numbers"}


def entries() -> dict[str, str]:
    """Title -> text of an entry."""
    pieces = re.split(r"^### (.+)\n", ENTRIES.split("\n## ", 1)[1], flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def test_an_entry_says_what_was_tried_with_what_numbers_and_how_it_ended() -> None:
    wrong = []
    for title, text in entries().items():
        found = [part for line in text.splitlines() for part in PARTS if line.startswith(part)]
        missing = set(PARTS) - set(found) - OPTIONAL
        in_order = found == [part for part in PARTS if part in found]
        if missing or not in_order or not re.match(r"\d{4}-\d\d-\d\d \S", title):
            wrong.append((title, found))
    assert entries()
    assert wrong == []


def test_the_contents_name_every_topic_and_entry_in_order() -> None:
    contents, rest = ENTRIES.split("\n## ", 1)
    listed = re.findall(r"^ *- \[(.+)\]\(#", contents, flags=re.MULTILINE)
    headings = re.findall(r"^##(?:# \d{4}-\d\d-\d\d)? (.+)$", f"## {rest}", flags=re.MULTILINE)
    assert listed == headings
