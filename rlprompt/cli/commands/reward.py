"""`rlprompt reward`: tools for rewards. What each does is in `rlprompt.rewards`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.recipe.yaml_file import apply_override
from rlprompt.rewards.base import RewardSettings
from rlprompt.rewards.check.checks import CheckRow, Trial, check_reward
from rlprompt.rewards.check.inputs import read_pairs
from rlprompt.tracking.console import PlainConsole

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "dim"}


def check(
    path: str,
    options: Sequence[str],
    columns: Sequence[str],
    pairs: Path | None,
    timeout: float,
) -> int:
    """Try a reward and print what was found; returns the exit code, 1 when a check failed.

    Args:
        path: the reward as in a recipe, relative to the working directory; `file.py` means
            `file.py:reward`.
        options: `key=value` strings, values parsed as YAML.
        columns: the dataset columns, in the same form.
        pairs: a JSONL file of compared answers.
        timeout: seconds that one call may take.

    Raises:
        InputError: the reward cannot be loaded or called, or an argument is wrong.
    """
    console = PlainConsole()
    setup_logging(console, logging.WARNING)
    settings = RewardSettings(
        path=f"{path}:reward" if path.endswith(".py") else path,
        timeout=timeout,
        options=_pairs_of(options),
    )
    known = [] if pairs is None else read_pairs(pairs)
    trial = Trial(settings, Path.cwd(), _pairs_of(columns), known)
    with console.status(f"checking {settings.path}"):
        rows = check_reward(trial)
    console.print(_table(rows))
    failed = sum(row.outcome == "failed" for row in rows)
    verdict = f"{failed} of {len(rows)} checks failed" if failed else "ready to train on"
    console.print(Text(f"{settings.path}: {verdict}", style="bold"), soft_wrap=True)
    return 1 if failed else 0


def _pairs_of(texts: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for text in texts:
        apply_override(tree, text)
    return tree


def _table(rows: Sequence[CheckRow]) -> Table:
    table = Table("check", "outcome", "found", box=None, pad_edge=False)
    for row in rows:
        outcome = Text(row.outcome, style=_STYLES[row.outcome])
        table.add_row(row.name, outcome, Text(row.detail, overflow="fold"))
    return table
