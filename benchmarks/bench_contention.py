"""What a GRPO step costs beside other work on the same cores.

    python benchmarks/bench_contention.py [--json FILE] [--steps 5] [--tokens 48] [--model FOLDER]

Two processes train alike (SmolLM2-135M): one waits as `rlprompt` does, the other as OpenMP's
library does by itself. They take turns step by step, first with the machine to themselves and then
beside 1 and 4 processes that only count. A fair share of the cores makes a step of T threads on C
cores take (T + N) / C of its quiet time beside N neighbours, and no less than its quiet time.

    slowdown_1, slowdown_4    seconds of our step beside 1 and 4 neighbours, over that fair share
                              of its quiet seconds (goal: 1.25)
    default_1, default_4      the same of the other process
    quiet_cost                our quiet seconds over the other's, less 1 (goal: 0.03)

The machine has to be quiet otherwise: what runs beside it counts as a neighbour. `load_before` says
how quiet it was.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.client import Worker, model_folder, write_queries
from rlprompt.cpu_share import SPIN_COUNT, allowed_cpus

NEIGHBOURS = (0, 1, 4)
OURS, DEFAULT = "rlprompt", "default"
REWARD = "reward_models/concise.py:reward"
_BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:  # it ends with whoever started it, however that ends
    for _ in range(10**6):
        pass
"""
_SETTLE_S = 0.5


@contextmanager
def neighbours(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that use a core each for as long as the block lasts."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            started.append(subprocess.Popen([sys.executable, "-S", "-c", _BUSY]))
        time.sleep(_SETTLE_S)
        yield started
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait(timeout=30)


@contextmanager
def waiting_as(side: str) -> Iterator[None]:
    """The environment of a process that waits as `rlprompt` does, or as the library does."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
    before = {name: os.environ.pop(name, None) for name in names}
    try:
        if side == OURS:
            os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def fair_share(quiet: float, threads: int, beside: int, cores: int) -> float:
    """Seconds of a step beside neighbours when all threads get the same of the cores.

    Args:
        quiet: seconds of the step alone.
        threads: threads that it computes with.
        beside: number of neighbours, of one thread each.
        cores: cores of the machine that they share.
    """
    return quiet * max(1.0, (threads + beside) / cores)


def summary(
    seconds: Mapping[str, Mapping[int, Sequence[float]]], threads: int, cores: int
) -> dict[str, Any]:
    """The numbers of the module's head.

    Args:
        seconds: those of each step, by side and number of neighbours.
        threads: threads of each process.
        cores: cores that they share.
    """
    medians = {
        side: {count: statistics.median(steps) for count, steps in by_count.items()}
        for side, by_count in seconds.items()
    }
    found: dict[str, Any] = {}
    for side, name in ((OURS, "slowdown"), (DEFAULT, "default")):
        quiet = medians[side][0]
        for count in NEIGHBOURS[1:]:
            share = fair_share(quiet, threads, count, cores)
            found[f"{name}_{count}"] = medians[side][count] / share
    found["quiet_cost"] = medians[OURS][0] / medians[DEFAULT][0] - 1
    found["seconds"] = {
        side: {str(count): list(steps) for count, steps in by_count.items()}
        for side, by_count in seconds.items()
    }
    return found


def measure(flags: Mapping[str, Any], steps: int) -> dict[str, dict[int, list[float]]]:
    """Seconds of each step, by side and number of neighbours; the first two steps do not count."""
    workers = {}
    for side in (OURS, DEFAULT):
        with waiting_as(side):
            workers[side] = Worker(side, "rlprompt_grpo", dict(flags))
    seconds: dict[str, dict[int, list[float]]] = {side: {} for side in workers}
    for worker in workers.values():
        for _ in range(2):
            worker.step(counts=False)
    for count in NEIGHBOURS:
        with neighbours(count):
            for number in range(steps):
                turn = list(workers.items())
                for side, worker in turn if number % 2 == 0 else reversed(turn):
                    taken = float(worker.step(counts=True)["seconds"])
                    seconds[side].setdefault(count, []).append(taken)
                    said = (
                        f"{count} neighbours, step {number + 1} of {steps}, {side}: {taken:.1f} s"
                    )
                    print(said, file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.quit()
    return seconds


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(
        prog="bench_contention.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each kind")
    parser.add_argument("--tokens", type=int, default=48, help="length of completions")
    parser.add_argument("--model", type=Path, help="folder of a model; default: SmolLM2-135M")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cores = len(os.sched_getaffinity(0))
    threads = min(int(os.environ.get("OMP_NUM_THREADS", allowed_cpus())), allowed_cpus())
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "model": options.model or model_folder(),
            "queries": write_queries(Path(folder)),
            "reward": REWARD,
            "max-new-tokens": options.tokens,
            "min-new-tokens": options.tokens,
            "threads": threads,
        }
        seconds = measure(flags, options.steps)
    found = summary(seconds, threads, cores)
    found |= {"threads": threads, "cores": cores, "load_before": load, "spin_count": SPIN_COUNT}
    for key, value in found.items():
        if isinstance(value, float):
            print(f"{key:14} {value:.3f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
