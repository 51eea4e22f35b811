"""`rlprompt init`: a first recipe with data and reward, to be edited."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from rlprompt.recipe.starter import RECIPE_NAME, REWARD_NAME, write_starter


def run(folder: Path | None, target: str) -> None:
    """Write the files and say what to do with them.

    Args:
        folder: the folder; None = one in the working directory that has the target's name.
        target: what the prompt is to achieve; see `STARTERS`.

    Raises:
        InputError: see `write_starter`.
    """
    place = Path(target) if folder is None else folder
    for path in write_starter(target, place):
        typer.echo(f"wrote {path}")
    recipe, reward = (shlex.quote(str(place / name)) for name in (RECIPE_NAME, REWARD_NAME))
    typer.echo(
        "\nIt runs as it is; then put your own queries, reward and text in place. Next:\n"
        f"  rlprompt reward check {reward}\n"
        f"  rlprompt train {recipe} training.steps=2"
    )
