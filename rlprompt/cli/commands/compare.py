"""`rlprompt compare`: several runs in one page, and in words on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from rlprompt.certify.verdict import phrase
from rlprompt.errors import InputError
from rlprompt.files import to_json
from rlprompt.reports.compare import RunComparison, compare_runs, write_comparison
from rlprompt.tracking.console import PlainConsole, clean_text, format_number


def run(folders: Sequence[Path], output: Path, as_json: bool) -> None:
    """Compare runs, write the page, and print a table or JSON.

    Args:
        folders: run folders, two or more.
        output: page to write.
        as_json: whether JSON is printed in place of the table.

    Raises:
        InputError: a folder holds no run, or the page cannot be written.
    """
    comparison = compare_runs(folders)
    try:
        write_comparison(comparison, output)
    except OSError as error:
        raise InputError(
            f"the comparison cannot be written to '{output}' ({error.strerror}); name a file in a "
            "folder that exists and is writable"
        ) from error
    if as_json:
        sys.stdout.write(to_json(comparison.plain(), indent=2) + "\n")
        return
    _show(comparison, output, PlainConsole())


def _show(comparison: RunComparison, output: Path, console: PlainConsole) -> None:
    table = Table()
    for column in ("run", f"{comparison.split} reward", "95% interval", "queries", "step"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for each in comparison.runs:
        mean = each.mean
        table.add_row(
            Text(clean_text(each.name, 80, console.encoding)),
            format_number(mean.value),
            f"{format_number(mean.low)} to {format_number(mean.high)}",
            str(mean.num_queries),
            str(each.run.best_step),
        )
    console.print(table)
    first, *others = comparison.runs
    for each in others:
        if each.against_first is not None:
            sentence = f"{each.name}: {phrase(each.against_first, first.name)}"
            line = clean_text(sentence, 400, console.encoding)
            console.print(Text(line, style="bold"), soft_wrap=True)
    if comparison.unpaired:
        console.print(
            Text(f"no run is held against another: {comparison.unpaired}"), soft_wrap=True
        )
    for key, values in comparison.differing.items():
        line = f"{key}: " + " | ".join("-" if value is None else str(value) for value in values)
        console.print(Text(clean_text(line, 400, console.encoding)), soft_wrap=True)
    console.print(Text(f"page     {output}"), soft_wrap=True)
