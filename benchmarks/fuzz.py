"""Read tens of thousands of hostile inputs, and count what goes wrong.

    python benchmarks/fuzz.py [--inputs 22000] [--seed 0] [--only CATEGORY ...] [--json FILE]

Recipes, overrides, data, artifacts, checkpoints, model folders, chat templates, and requests to a
reward server: good ones with seeded changes, and a list of bad ones for each. An input is accepted,
or refused by one sentence (`InputError`). Anything else is a fault:

    crashes  another exception, or a sentence of several lines
    hangs    more than ten seconds of CPU time, or sixty by the clock
    leaks    a secret in a sentence; files left open; memory that grows
    silent   accepted although it is known to be wrong

Exit code 0 without a fault, else 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from benchmarks.fuzzing import folders, requests, texts
from benchmarks.fuzzing.judge import Case, Findings, judge, limit_memory

FAULTS = ("crashes", "hangs", "leaks", "silent")
SECONDS = 10
CATEGORIES: dict[str, tuple[Callable[[random.Random, Path], Iterator[Case]], float]] = {
    "recipes": (texts.recipes, 0.18),
    "overrides": (texts.overrides, 0.27),
    "data": (texts.data, 0.26),
    "artifacts": (folders.artifacts, 0.1),
    "checkpoints": (folders.checkpoints, 0.06),
    "models": (folders.models, 0.03),
    "templates": (texts.templates, 0.02),
    "requests": (requests.requests, 0.08),
}
"""Inputs by category, and the share of all that it gets."""


def main(arguments: list[str] | None = None) -> int:
    """Run the categories and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=22_000, metavar="N", help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=CATEGORIES, default=list(CATEGORIES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    limit_memory()
    found: dict[str, Findings] = {}
    for name in options.only:
        count = max(1, round(options.inputs * CATEGORIES[name][1]))
        found[name] = run(name, count, options.seed)
        print(f"{name}: {json.dumps(found[name].row())}", flush=True)
    report = summary(found, options.seed, arguments)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print({key: report[key] for key in ("inputs", *FAULTS, "seconds")})
    return 1 if any(report[fault] for fault in FAULTS) else 0


def run(name: str, count: int, seed: int) -> Findings:
    """Judge `count` inputs of a category."""
    make, _ = CATEGORIES[name]
    with tempfile.TemporaryDirectory(prefix="rlprompt_fuzz_") as place:
        cases = make(random.Random(f"{seed}:{name}"), Path(place))
        try:
            return judge(cases, count, SECONDS)
        finally:
            close = getattr(cases, "close", None)
            if close is not None:
                close()


def summary(found: dict[str, Findings], seed: int, arguments: list[str] | None) -> dict[str, Any]:
    """What is written: totals, and each category."""
    words = sys.argv[1:] if arguments is None else arguments
    totals = {
        key: sum(getattr(each, key) for each in found.values())
        for key in ("inputs", "accepted", "refused", *FAULTS)
    }
    return {
        "command": shlex.join(["python", "benchmarks/fuzz.py", *words]),
        "seed": seed,
        **totals,
        "seconds": round(sum(each.seconds for each in found.values()), 1),
        "categories": {name: each.row() for name, each in found.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
