"""Every `rlprompt` command in the docs exists, with the options that it is shown with."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from rlprompt.cli.main import app
from tests.docs.pages import DOCS

ROOT = DOCS.parent
OF_THEIR_DAY = {"log.md"}
"""Pages whose commands are of their day."""
PAGES = [
    ROOT / "README.md",
    *(path for path in sorted(DOCS.rglob("*.md")) if path.name not in OF_THEIR_DAY),
]
FENCE = re.compile(r"^ *```(?:bash|sh|console)?\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Command lines of the blocks of a shell, without prompts, joined at backslashes."""
    found = []
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if re.match(r"rlprompt\s", line):
                found += [part.strip() for part in re.split(r"&&|\|\||[|;]", line)][:1]
    return found


def fault(command: str) -> str | None:
    """What is wrong with a command line: no such command, no such option, or None."""
    words = shlex.split(command, comments=True)[1:]
    current: Any = typer.main.get_command(app)
    while words and hasattr(current, "commands"):
        if words[0] in ("--help", "--version"):
            return None
        if words[0] not in current.commands:
            return f"no command {words[0]!r}"
        current = current.commands[words.pop(0)]
    known = {name for each in current.params for name in [*each.opts, *each.secondary_opts]}
    known.add("--help")
    options = [word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]
    wrong = [word for word in options if word not in known]
    return f"no option {wrong[0]!r}" if wrong else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_the_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = {command: fault(command) for command in commands(text)}
    assert {command: wrong for command, wrong in found.items() if wrong} == {}


def test_what_does_not_exist_is_found() -> None:
    text = "```bash\nrlprompt trian a.yaml  # no\n$ rlprompt train a.yaml \\\n  --outptu b\n```\n"
    assert [fault(command) for command in commands(text)] == [
        "no command 'trian'",
        "no option '--outptu'",
    ]
    assert fault("rlprompt train a.yaml --output b") is None
    assert fault("rlprompt registry add a b -m 'x y'") is None
