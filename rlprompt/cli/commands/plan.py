"""`rlprompt plan`: what a recipe will need on other hardware, as tables."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.errors import InputError
from rlprompt.files import to_json
from rlprompt.planning.plan import Plan, plan
from rlprompt.planning.tables import DEVICES, SHAPES, Device, Shape
from rlprompt.recipe.schema import load_recipe
from rlprompt.tracking.console import PlainConsole

_DEFAULT_GPUS = 8
_DEFAULT_SIZE = "8b"


def run(
    recipe_path: Path,
    overrides: Sequence[str],
    *,
    model_size: str | None,
    model: str | None = None,
    gpus: int | None,
    gpu: str,
    query_tokens: int,
    gpus_per_node: int | None = None,
    network: float | None = None,
    as_json: bool = False,
) -> None:
    """Print memory per GPU, traffic and bounds.

    Args:
        recipe_path: a YAML file.
        overrides: `key.path=value` strings.
        model_size: size of the base, a key of `SHAPES`; None = 8b, unless a model is named.
        model: config of the base in place of a size; see `shape_of_model`.
        gpus: number of GPUs, one rank each; None = 8, or one per query of a step where those are
            fewer.
        gpu: name of the GPU, a key of `DEVICES`.
        query_tokens: mean length of a query with its template.
        gpus_per_node: number of GPUs whose link is that of a node; None = that of the data sheet.
        network: rate from other nodes for each GPU, GB/s; None = that of the data sheet.
        as_json: whether to print JSON: sizes in bytes, times in seconds.

    Raises:
        InputError: the recipe is wrong, size or device have no entry, or there is no such model.
    """
    console = PlainConsole()
    setup_logging(console, logging.WARNING)
    recipe = load_recipe(recipe_path, overrides)
    gpus = gpus or min(_DEFAULT_GPUS, recipe.training.queries_per_step)
    shape, device = _shape(model_size, model), _device(gpu, gpus_per_node, network)
    made = plan(recipe, shape, gpus, device, query_tokens=query_tokens)
    if as_json:
        asked = {
            "recipe": recipe.name,
            "model_size": model or model_size or "8b",
            "gpus": gpus,
            "gpu": gpu,
        }
        sys.stdout.write(to_json({**asked, **_plain(made, device)}, indent=2) + "\n")
        return
    console.print(
        f"{recipe.name}: {shape.parameters / 1e9:.2f}e9 parameters, base "
        f"{recipe.distributed.base} over {gpus} x {gpu}",
        soft_wrap=True,
    )
    _print(made, device, console)


def _shape(size: str | None, model: str | None) -> Shape:
    if model is not None:
        if size is not None:
            raise InputError("--model-size and --model both name the base; keep one")
        from rlprompt.planning.shapes import shape_of_model

        return shape_of_model(model)
    return SHAPES[_entry("size", size or _DEFAULT_SIZE, SHAPES)]


def _device(name: str, per_node: int | None, network: float | None) -> Device:
    device = DEVICES[_entry("device", name, DEVICES)]
    if network is not None and not (math.isfinite(network) and network > 0):
        raise InputError(f"--network is {network:g}; give GB/s above 0")
    changes: dict[str, Any] = {"per_node": per_node}
    changes["network"] = None if network is None else network * 1e9
    return replace(device, **{key: value for key, value in changes.items() if value is not None})


def _entry(name: str, value: str, known: Mapping[str, object]) -> str:
    if value not in known:
        listed = ", ".join(known)
        raise InputError(f"there is no {name} '{value}' in the tables; use one of {listed}")
    return value


def _print(made: Plan, device: Device, console: PlainConsole) -> None:
    memory = Table("memory of each GPU", "GB")
    for part, size in made.memory.items():
        if size:
            memory.add_row(part, _gigabytes(size))
    memory.add_section()
    for part, size in (("a rollout", made.rollout_bytes), ("an update", made.update_bytes)):
        fits = "fits" if size < device.memory else f"does not fit {device.memory / 1e9:.0f} GB"
        memory.add_row(f"together in {part}", f"{_gigabytes(size)}  {fits}")
    if made.host_bytes:
        memory.add_row("on its host or disk: base", _gigabytes(made.host_bytes))
    console.print(memory)
    step = Table("a step", "")
    for part, size in made.traffic.items():
        step.add_row(f"received by each GPU: {part}", f"{_gigabytes(size)} GB")
    for part, seconds in made.bounds.items():
        step.add_row(f"{part}, at least", f"{seconds:.3g} s")
    step.add_row("step, at least", f"{made.step_seconds:.3g} s")
    step.add_row("completion tokens, at most", f"{made.decode_tokens_per_second:,.0f} /s")
    console.print(step)
    for sentence in made.advice:
        console.print(sentence, soft_wrap=True)
    console.print("a model of shapes and data sheets, not a measurement; see docs/cluster.md")


def _plain(made: Plan, device: Device) -> dict[str, Any]:
    """A plan as plain values."""
    return {
        "memory_bytes": made.memory,
        "rollout_bytes": made.rollout_bytes,
        "update_bytes": made.update_bytes,
        "device_bytes": device.memory,
        "fits": max(made.rollout_bytes, made.update_bytes) < device.memory,
        "traffic_bytes": made.traffic,
        "bounds_seconds": made.bounds,
        "step_seconds": made.step_seconds,
        "host_bytes": made.host_bytes,
        "fitting_rows": made.fitting_rows,
        "advice": list(made.advice),
        "decode_tokens_per_second": made.decode_tokens_per_second,
    }


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g}"
