"""Simulate steps on 8 to 512 GPUs and hold `rlprompt plan` against what comes out.

    python benchmarks/simulate_cluster.py [--json FILE] [--plot FILE.svg] [--seed 0]
        [--gpus 8,64,512] [--sizes 8b,70b] [--reward-ms 0.3]

A model against a model: nothing is measured on GPUs here. `rlprompt plan` is a closed form of equal
ranks, full-length completions and free meetings; the simulation plays the same step as events, with
completions of drawn lengths, slow ranks, meetings over gloo, rewards, checkpoints and failures
(`cluster_model/`). With all of that off it must give the plan's number (`ideal`); each effect then
comes on top of those before it, so that a cell says where its time goes.

`weak`: 8 queries per GPU and step. `strong`: 512 queries per step on any number of GPUs. A base
lies whole on each GPU where it fits beside cache and activations, else in shards. Efficiency is
completion tokens per GPU-second over those of the fewest GPUs. One thread, about half a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cluster_model import costs
from benchmarks.cluster_model.events import Timeline, goodput
from benchmarks.cluster_model.job import Conditions, Job, draw_lengths
from benchmarks.cluster_model.step import KINDS, steps_of
from rlprompt.errors import InputError
from rlprompt.planning.tables import DEVICES, SHAPES, Shape

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "distributed" / "two_nodes.yaml"
GPUS = (8, 16, 32, 64, 128, 256, 512)
SIZES: Mapping[str, Shape] = {
    "0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936, True),  # Qwen2.5
    "1b": SHAPES["1b"],
    "3b": SHAPES["3b"],
    "8b": SHAPES["8b"],
    "32b": Shape(64, 5120, 27648, 40, 8, 128, 152064, False),  # Qwen2.5
    "70b": SHAPES["70b"],
}
DEVICE = "h100"
QUERIES = {"weak": 8, "strong": 512}
"""Queries of a step: per GPU, or in all."""
GROUP_SIZE, QUERY_TOKENS, MAX_TOKENS, VIRTUAL_TOKENS = 8, 128, 512, 16
BUDGETS = tuple((QUERY_TOKENS + GROUP_SIZE * (MAX_TOKENS - 1)) // parts for parts in (1, 2, 4))
"""Tokens of a micro-batch: it holds one group of the longest completions, or a part of one."""
ROWS = (256, 128, 64, 32, 16, 8)
"""Completions that are decoded at a time."""
HALF = 0.5

ASSUMED = Conditions(
    length_spread=0.6,  # the longest of 64 is cut at T, the mean is about 0.55 T
    slow_chance=0.01,  # assumed
    slow_factor=1.5,  # assumed
    jitter=0.02,  # assumed
    has_prefill=True,
    launch_s=60e-6,  # assumed: 15 kernels of a layer, 4 us each
    hop_s=50e-6,  # assumed: TCP between nodes, and Python around it
    socket_rate=1.25e9,  # assumed: 10 Gbit/s for a connection
    pickle_s=3.3e-9,  # pickle.loads of completions on one core of this machine
    gather_s=1e-6,  # assumed: NCCL inside a node
    far_gather_s=5e-6,  # assumed: NCCL between nodes
    reward_s=0.3e-3,  # seven built-in rules, docs/results/bench_rewards.json
    checkpoint_s=0.5,  # assumed: a prompt is small, the file system shared
    device_mtbf_s=50_700 * 3600.0,  # 419 in 54 days on 16,384 GPUs: Llama 3, arXiv 2407.21783
    hang_share=0.1,  # assumed
    hang_s=900.0,  # the default of distributed.timeout_s
    requeue_s=120.0,  # assumed
    node_read_rate=2e9,  # assumed
    file_system_rate=50e9,  # assumed
)
EFFECTS: Mapping[str, tuple[str, ...]] = {
    "ideal": (),
    "lengths": ("length_spread",),
    "prefill and launches": ("has_prefill", "launch_s"),
    "slow ranks": ("slow_chance", "slow_factor", "jitter"),
    "meetings": ("hop_s", "socket_rate", "pickle_s", "gather_s", "far_gather_s"),
    "rewards and checkpoints": ("reward_s", "checkpoint_s"),
}
"""Fields of `Conditions` that come on, each line on top of those before."""


@dataclass(frozen=True)
class Cell:
    """One job, planned and simulated."""

    size: str
    gpus: int
    scaling: str
    base: str
    """replicated, gathered (in shards, whole for a rollout) or layers (in shards)."""
    max_rows: int
    planned_s: float
    """What `rlprompt plan` says of a step."""
    simulated_s: Mapping[str, float]
    """Seconds of a step by the last effect that is on; `failures` is the last."""
    spent_s: Mapping[str, float]
    """Seconds of a step by kind, mean of all ranks, with every effect."""
    tokens: float
    """Completion tokens of a step."""

    @property
    def ratio(self) -> float:
        """A step as simulated over one as planned."""
        return self.simulated_s["failures"] / self.planned_s

    @property
    def rate(self) -> float:
        """Completion tokens per GPU-second."""
        return self.tokens / self.simulated_s["failures"] / self.gpus


def conditions_after(effect: str, assumed: Conditions) -> Conditions:
    """The conditions with an effect and those before it.

    Args:
        effect: key of `EFFECTS`.
        assumed: conditions that the values come from.
    """
    names = list(EFFECTS)
    on = [name for each in names[: names.index(effect) + 1] for name in EFFECTS[each]]
    return replace(Conditions(), **{name: getattr(assumed, name) for name in on})


def simulate(job: Job, assumed: Conditions, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step by effect, and by kind with all of them.

    Args:
        job: the job.
        assumed: conditions of which effect after effect comes on.
        seed: seed of all that is drawn.
    """
    played: dict[str, Timeline] = {}
    for effect in EFFECTS:
        played[effect] = steps_of(job, conditions_after(effect, assumed), seed)
    seconds = {effect: each.seconds / job.save_every for effect, each in played.items()}
    last = played["rewards and checkpoints"]
    share = goodput(
        last.seconds,
        job.ranks / assumed.device_mtbf_s,
        costs.restart_seconds(job, assumed),
        np.random.default_rng([seed, 2]),
    )
    step = last.seconds / job.save_every
    seconds["failures"] = step / share
    spent = {kind: last.spent.get(kind, 0.0) / job.save_every for kind in KINDS}
    spent["failures"] = seconds["failures"] - step
    return seconds, spent


def plan_cell(size: str, gpus: int, scaling: str) -> tuple[Job, float]:
    """The job of a cell, and the seconds that `rlprompt plan` gives a step of it.

    The base is whole on each GPU where it can be, else in shards; with the largest micro-batches,
    and then the most rows at a time, that fit.

    Args:
        size: key of `SIZES`.
        gpus: the number of GPUs, W.
        scaling: key of `QUERIES`.

    Raises:
        InputError: not even one group fits in shards.
    """
    from rlprompt.planning.plan import plan  # loads torch, which the model does not need
    from rlprompt.recipe.schema import load_recipe

    queries = QUERIES[scaling] * (gpus if scaling == "weak" else 1)
    shape, device = SIZES[size], DEVICES[DEVICE]
    for base, budget, rows in product(("replicated", "sharded"), BUDGETS, ROWS):
        changes = [
            f"training.queries_per_step={queries}",
            f"training.token_budget={budget}",
            f"sampling.max_tokens={MAX_TOKENS}",
            f"algorithm.group_size={GROUP_SIZE}",
            f"prompt.num_virtual_tokens={VIRTUAL_TOKENS}",
            f"engine.max_rows={rows}",
            f"distributed.base={base}",
            "distributed.secondary_shards=null",
        ]
        recipe = load_recipe(RECIPE, changes)
        made = plan(recipe, shape, gpus, device, query_tokens=QUERY_TOKENS)
        if max(made.rollout_bytes, made.update_bytes) >= device.memory:
            continue
        free = device.memory - shape.parameters * 2 / gpus
        job = Job(
            shape=shape,
            device=device,
            ranks=gpus,
            queries=queries,
            group_size=GROUP_SIZE,
            query_tokens=QUERY_TOKENS,
            prompt_tokens=VIRTUAL_TOKENS,
            max_tokens=MAX_TOKENS,
            max_rows=rows,
            token_budget=budget,
            trained=VIRTUAL_TOKENS * shape.width,
            is_sharded=base == "sharded",
            rolls_out_whole=base == "sharded" and shape.parameters * 2 <= HALF * free,
            save_every=recipe.training.save_every,
        )
        return job, made.step_seconds
    raise InputError(f"a base of {size} does not fit {gpus} x {DEVICE}; give more --gpus")


def cell_of(size: str, gpus: int, scaling: str, assumed: Conditions, seed: int) -> Cell:
    """Plan and simulate a cell.

    Args:
        size: key of `SIZES`.
        gpus: the number of GPUs.
        scaling: key of `QUERIES`.
        assumed: conditions of which effect after effect comes on.
        seed: seed of all that is drawn.
    """
    job, planned = plan_cell(size, gpus, scaling)
    seconds, spent = simulate(job, assumed, seed)
    drawn = np.random.default_rng([seed, 0])
    lengths = [draw_lengths(job, assumed.length_spread, drawn) for _ in range(job.save_every)]
    base = "replicated"
    if job.is_sharded:
        base = "layers" if job.draws_together else "gathered"
    tokens = float(sum(each.sum() for each in lengths)) / job.save_every
    return Cell(size, gpus, scaling, base, job.max_rows, planned, seconds, spent, tokens)


def limits(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Per size and scaling: efficiency, and where and why it falls below one half.

    The cause is the kind whose GPU-seconds per token have grown most since the fewest GPUs.

    Args:
        cells: all cells.
    """
    found = []
    for size, scaling in dict.fromkeys((cell.size, cell.scaling) for cell in cells):
        own = sorted(
            (cell for cell in cells if (cell.size, cell.scaling) == (size, scaling)),
            key=lambda cell: cell.gpus,
        )
        least = own[0]
        efficiency = {cell.gpus: cell.rate / least.rate for cell in own}
        below = next((cell for cell in own if efficiency[cell.gpus] < HALF), None)
        row: dict[str, Any] = {
            "size": size,
            "scaling": scaling,
            "efficiency": {str(gpus): share for gpus, share in efficiency.items()},
            "below_half_at": below.gpus if below else None,
            "grows_most": None,
        }
        told = below or own[-1]
        if told is not least:
            grown = {kind: _per_token(told, kind) - _per_token(least, kind) for kind in KINDS}
            row["grows_most"] = max(grown, key=lambda kind: grown[kind])
        found.append(row)
    return found


def _per_token(cell: Cell, kind: str) -> float:
    return cell.spent_s[kind] * cell.gpus / cell.tokens


def balancing(gpus: Sequence[int], seed: int, assumed: Conditions) -> list[dict[str, float]]:
    """What giving groups to ranks by their tokens saves of a step, beside by number (8b, weak).

    Args:
        gpus: the numbers of GPUs.
        seed: seed of all that is drawn.
        assumed: conditions.
    """
    conditions = conditions_after("rewards and checkpoints", assumed)
    found = []
    for number in gpus:
        job, _ = plan_cell("8b", number, "weak")
        plain = steps_of(replace(job, balances=False), conditions, seed)
        even = steps_of(job, conditions, seed)
        found.append({"gpus": number, "saved_share": 1 - even.seconds / plain.seconds})
    return found


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Draw efficiency over GPUs, and the simulated step over the planned one.

    Args:
        cells: all cells.
        path: file to write; its ending says the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "simulate_cluster"
    scalings = list(dict.fromkeys(cell.scaling for cell in cells))
    figure, axes = plt.subplots(2, len(scalings), figsize=(9, 6), squeeze=False)
    efficient = {(row["size"], row["scaling"]): row["efficiency"] for row in limits(cells)}
    for column, scaling in enumerate(scalings):
        for size in dict.fromkeys(cell.size for cell in cells):
            own = [cell for cell in cells if (cell.size, cell.scaling) == (size, scaling)]
            numbers = [cell.gpus for cell in own]
            shares = [efficient[size, scaling][str(number)] for number in numbers]
            axes[0][column].plot(numbers, shares, marker=".", label=size)
            axes[1][column].plot(numbers, [cell.ratio for cell in own], marker=".", label=size)
        axes[0][column].set_title(f"{scaling} scaling")
        axes[0][column].axhline(HALF, color="black", linewidth=0.7, linestyle=":")
        axes[0][column].set_ylim(0, 1.1)
        axes[1][column].set_yscale("log", base=2)
        axes[1][column].set_xlabel("GPUs")
        for row in (0, 1):
            axes[row][column].set_xscale("log", base=2)
            axes[row][column].grid(alpha=0.3)
    axes[0][0].set_ylabel("efficiency")
    axes[1][0].set_ylabel("simulated step / planned step")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def rounded(value: Any) -> Any:
    """Plain values with four digits, so that another machine writes the same file.

    Args:
        value: numbers, texts, and mappings and sequences of them.
    """
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, print, draw, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--plot", type=Path, help="where the curves are drawn (.svg or .png)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--gpus", default=",".join(map(str, GPUS)), help="numbers, with commas")
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--reward-ms", type=float, default=0.3, help="of one completion")
    options = parser.parse_args(arguments)
    gpus, sizes = _asked(parser, options)
    assumed = replace(ASSUMED, reward_s=options.reward_ms / 1e3)
    cells = []
    for scaling in QUERIES:
        for size in sizes:
            for number in gpus:
                try:
                    cell = cell_of(size, number, scaling, assumed, options.seed)
                except InputError as error:
                    parser.error(str(error))
                cells.append(cell)
                simulated = cell.simulated_s["failures"]
                print(
                    f"{scaling:7}{size:>5}{number:5} GPUs {cell.base:10} plan {cell.planned_s:9.2f}"
                    f" s  simulated {simulated:9.2f} s  ratio {cell.ratio:5.2f}"
                )
    found = limits(cells)
    for row in found:
        where = row["below_half_at"]
        said = f"below one half at {where} GPUs" if where else f"above one half to {gpus[-1]} GPUs"
        print(f"{row['scaling']:7}{row['size']:>5} {said}; grows most: {row['grows_most']}")
    result = {
        "seed": options.seed,
        "device": DEVICE,
        "assumed": asdict(assumed),
        "work": {
            "queries": QUERIES,
            "group_size": GROUP_SIZE,
            "query_tokens": QUERY_TOKENS,
            "max_tokens": MAX_TOKENS,
        },
        "cells": [{**asdict(cell), "ratio": cell.ratio} for cell in cells],
        "limits": found,
        "balancing": balancing(gpus, options.seed, assumed) if "8b" in sizes else [],
    }
    if options.json:
        options.json.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(cells, options.plot)


def _asked(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[list[int], list[str]]:
    """The numbers of GPUs, in order, and the sizes; ends with a sentence where one is wrong."""
    try:
        gpus = sorted({int(each) for each in options.gpus.split(",")})
    except ValueError:
        parser.error(f"--gpus is '{options.gpus}'; give whole numbers with commas, like 8,64")
    if gpus[0] < 1 or gpus[-1] > QUERIES["strong"]:
        parser.error(f"--gpus is '{options.gpus}'; give numbers from 1 to {QUERIES['strong']}")
    sizes = list(dict.fromkeys(options.sizes.split(",")))
    for size in sizes:
        if size not in SIZES:
            parser.error(f"--sizes names '{size}'; use some of {', '.join(SIZES)}")
    if not 0 <= options.reward_ms < 1e6:
        parser.error(f"--reward-ms is {options.reward_ms}; give milliseconds from 0 to a million")
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}; give 0 or more")
    if options.plot and options.plot.suffix not in (".svg", ".png"):
        parser.error(f"--plot is '{options.plot}'; give a file that ends in .svg or .png")
    for path in (options.json, options.plot):
        if path and not path.parent.is_dir():
            parser.error(f"the folder {path.parent} does not exist; make it first")
    return gpus, sizes


if __name__ == "__main__":
    main()
