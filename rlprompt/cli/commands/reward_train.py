"""`rlprompt reward train`: a preference model from a recipe, and how right it is."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.errors import InputError
from rlprompt.reward_training.run import train_reward
from rlprompt.reward_training.settings import load_reward_recipe
from rlprompt.settings import folder_problem
from rlprompt.standard_streams import outlive_output
from rlprompt.tracking.console import PlainConsole


def train(
    recipe_path: Path, overrides: Sequence[str], output: Path | None, *, verbose: bool = False
) -> None:
    """Train and print the held-out results.

    Args:
        recipe_path: a YAML file.
        overrides: `key.path=value` strings.
        output: an empty folder; `runs/<name>` when None.
        verbose: whether to log more.

    Raises:
        InputError: something the recipe names is wrong, or the folder is not empty.
    """
    outlive_output()
    console = PlainConsole()
    setup_logging(console, logging.INFO, verbose)
    recipe = load_reward_recipe(recipe_path, overrides)
    if output is None:
        if folder_problem(recipe.name):
            raise InputError(f"the name {recipe.name!r} cannot be a folder; give --output")
        output = Path("runs") / recipe.name
    with console.status("reading data and model") as status:

        def progress(done: int, total: int, loss: float) -> None:
            line = f"update {done} of {total}, loss {loss:.3f}"
            status.update(line)
            if not console.is_terminal:
                console.print(line)

        summary = train_reward(recipe, recipe_path.parent, output, progress)
    console.print(_table(summary))
    console.print(Text(f"model: {output / 'model'}"), soft_wrap=True)


def _table(summary: Mapping[str, Any]) -> Table:
    table = Table("held out", "value", "95% interval", "n", box=None, pad_edge=False)

    def add(name: str, found: Mapping[str, Any]) -> None:
        interval = f"{found['low']:.3f} to {found['high']:.3f}"
        table.add_row(Text(name), f"{found['value']:.3f}", interval, str(found["of"]))

    add("pair accuracy", summary["heldout_pairs"]["accuracy"])
    judges = {"model": summary["heldout_answers"], **summary["rules"]}
    for judge, found in judges.items():
        for kind in ("accuracy", "sensitivity", "specificity") if found else ():
            add(f"{kind}, {judge}", found[kind])
    for name, found in (
        ("pairs", summary["heldout_pairs"]["calibrated"]),
        ("answers", summary["heldout_answers"]),
    ):
        if found:
            table.add_row(f"Brier, {name}", f"{found['brier']:.3f}", "", "")
            table.add_row(f"ECE, {name}", f"{found['ece']:.3f}", "", "")
    return table
