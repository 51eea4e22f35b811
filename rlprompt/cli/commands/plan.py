"""`rlprompt plan`: what a recipe will need on other hardware, as tables."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.errors import InputError
from rlprompt.planning.plan import plan
from rlprompt.planning.tables import DEVICES, SHAPES
from rlprompt.recipe.schema import load_recipe
from rlprompt.tracking.console import PlainConsole


def run(
    recipe_path: Path,
    overrides: Sequence[str],
    *,
    model_size: str,
    gpus: int,
    gpu: str,
    query_tokens: int,
) -> None:
    """Print memory per GPU, traffic and bounds.

    Raises:
        InputError: the recipe is wrong, or size or device have no entry.
    """
    console = PlainConsole()
    setup_logging(console, logging.WARNING)
    for name, value, known in (("size", model_size, SHAPES), ("device", gpu, DEVICES)):
        if value not in known:
            listed = ", ".join(known)
            raise InputError(f"there is no {name} '{value}' in the tables; use one of {listed}")
    recipe = load_recipe(recipe_path, overrides)
    shape, device = SHAPES[model_size], DEVICES[gpu]
    made = plan(recipe, shape, gpus, device, query_tokens=query_tokens)
    console.print(
        f"{recipe.name}: {shape.parameters / 1e9:.2f}e9 parameters, base "
        f"{recipe.distributed.base} over {gpus} x {gpu}",
        soft_wrap=True,
    )
    memory = Table("memory of each GPU", "GB")
    for part, size in made.memory.items():
        if size:
            memory.add_row(part, _gigabytes(size))
    memory.add_section()
    for part, size in (("a rollout", made.rollout_bytes), ("an update", made.update_bytes)):
        fits = "fits" if size < device.memory else f"does not fit {device.memory / 1e9:.0f} GB"
        memory.add_row(f"together in {part}", f"{_gigabytes(size)}  {fits}")
    console.print(memory)
    step = Table("a step", "")
    for part, size in made.traffic.items():
        step.add_row(f"received by each GPU: {part}", f"{_gigabytes(size)} GB")
    for part, seconds in made.bounds.items():
        step.add_row(f"{part}, at least", f"{seconds:.3g} s")
    step.add_row("step, at least", f"{made.step_seconds:.3g} s")
    step.add_row("completion tokens, at most", f"{made.decode_tokens_per_second:,.0f} /s")
    console.print(step)
    console.print("a model of shapes and data sheets, not a measurement; see docs/cluster.md")


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g}"
