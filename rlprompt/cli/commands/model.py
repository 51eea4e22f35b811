"""`rlprompt model`: the embedded models and the cache they are in."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.files import to_json
from rlprompt.model.files.fetch import fetch, list_models
from rlprompt.standard_streams import outlive_output
from rlprompt.tracking.console import PlainConsole


def fetch_model(name: str, *, verbose: bool = False) -> None:
    """Put an embedded model into the cache if it is not there; the last line says where it is.

    Raises:
        InputError: see `rlprompt.model.files.fetch.fetch`.
    """
    outlive_output()
    console = PlainConsole()
    setup_logging(console, logging.WARNING, verbose)
    with console.status("fetching"):
        folder = fetch(name, progress=lambda line: console.print(Text(line), soft_wrap=True))
    console.print(Text(str(folder)), soft_wrap=True)


def show_models(*, as_json: bool = False) -> None:
    """Print a table of the embedded models, or the same as JSON."""
    if as_json:
        sys.stdout.write(to_json([asdict(row) for row in list_models()], indent=2) + "\n")
        return
    table = Table("name", "download", "fetched", "licence", "path", box=None, pad_edge=False)
    for row in list_models():
        table.add_row(
            Text(row.name),
            f"{row.download_bytes / 1e6:.0f} MB",
            "yes" if row.fetched else "no",
            Text(row.licence),
            Text(str(row.folder), overflow="fold"),
        )
    PlainConsole().print(table)
