"""`rlprompt model`: embedded and converted models, and the cache they are in."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.files import to_json
from rlprompt.model.files.converted import list_converted
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


def convert_model(
    file: str, name: str, dtype: str, *, force: bool = False, verbose: bool = False
) -> None:
    """Put the model of a GGUF file into the cache; the last line says where it is.

    Args:
        file: path of the GGUF file.
        name: name that the model gets.
        dtype: precision that its weights are stored in.
        force: whether a converted model of that name is replaced.
        verbose: whether more is shown.

    Raises:
        InputError: see `rlprompt.model.gguf.convert.convert_gguf`.
    """
    outlive_output()
    console = PlainConsole()
    setup_logging(console, logging.WARNING, verbose)
    from rlprompt.model.gguf.convert import convert_gguf

    with console.status("converting"):
        folder = convert_gguf(
            file,
            name,
            dtype=dtype,
            force=force,
            progress=lambda line: console.print(Text(line), soft_wrap=True),
        )
    console.print(Text(str(folder)), soft_wrap=True)


def show_models(*, as_json: bool = False) -> None:
    """Print a table of the models that have a name, or the same as JSON."""
    rows = list_models() + list_converted()
    if as_json:
        sys.stdout.write(to_json([asdict(row) for row in rows], indent=2) + "\n")
        return
    table = Table("name", "download", "fetched", "licence", "path", box=None, pad_edge=False)
    for row in rows:
        here = "yes" if row.fetched else "no"
        table.add_row(
            Text(row.name),
            "-" if row.download_bytes is None else f"{row.download_bytes / 1e6:.0f} MB",
            here if row.download_bytes is not None else ("converted" if row.fetched else "damaged"),
            Text(row.licence),
            Text(str(row.folder), overflow="fold"),
        )
    PlainConsole().print(table)
