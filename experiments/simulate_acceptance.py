"""How often acceptance tests accept what is not better, find what is, and what that costs.

    python experiments/simulate_acceptance.py --json docs/results/acceptance.json

A run is a search of `--candidates` proposals against an incumbent, with rewards of 0 or 1. A query
has a difficulty, uniform between 0.1 and 0.8, which is the chance of a reward under the incumbent
and under each equal candidate; a better one has 0.1 more. In `equal` worlds no candidate is better,
and each acceptance is false. In `better` worlds one of them is, at a place that is drawn.

Three ways to use the test of `rlprompt.certify` are run, and GEPA's default rule beside them:

- `fresh`: one candidate after the other, each on queries of its own, their number not announced;
- `reuse`: the same on one pool of queries for all of the run, of which each meets a random order;
- `race`: all candidates at once on the same queries (a quarter of the runs: it tests all pairs).

`rollouts_ratio` compares the answers that a `better` run draws, those of the incumbent among them,
with testing on everything: all candidates and the incumbent once on as many queries as a paired
test of fixed size needs for the same power at the same error rate (normal approximation,
Bonferroni).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from rlprompt.certify.acceptance import Acceptance  # noqa: E402
from rlprompt.certify.racing import Race  # noqa: E402

ALPHA = 0.05
EFFECT = 0.1
BATCH = 16
MINIBATCH = 3
"""Examples that GEPA looks at by default."""
POOL = 3_000
"""Queries of the `reuse` worlds."""
LIMIT = 20_000
"""Queries after which a race is given up; none has come near it."""
EASE = (0.1, 0.8)
"""Range of a query's chance of a reward under the first incumbent."""


@dataclass(frozen=True)
class World:
    """True mean advantages of the candidates over the first incumbent, and what is drawn."""

    effects: NDArray[np.float64]
    """[K]"""
    draw: np.random.Generator

    def ease(self, count: int) -> NDArray[np.float64]:
        """[count] chances of a reward under the first incumbent, of new queries."""
        return self.draw.uniform(*EASE, count)

    def rewards(self, ease: NDArray[np.float64], effect: float) -> NDArray[np.float64]:
        """Rewards of a prompt on queries."""
        return (self.draw.random(len(ease)) < ease + effect).astype(np.float64)


@dataclass(frozen=True)
class Outcome:
    """What came of one run."""

    is_false: bool
    """Whether it ever accepted a candidate that is not better than its incumbent."""
    is_found: bool
    """Whether it ended with a better incumbent than it began with."""
    rollouts: int
    """Answers that were drawn, the incumbent's among them."""


def one_by_one(world: World, *, reuse: bool = False) -> Outcome:
    """Candidates in order, each against the incumbent of its time."""
    acceptance = Acceptance(ALPHA, reuse=reuse, min_effect=EFFECT)
    incumbent, is_false, rollouts = 0.0, False, 0
    pool = world.ease(POOL) if reuse else None
    for effect in world.effects:
        test = acceptance.begin()
        order = world.draw.permutation(POOL) if reuse else None
        while test.decision == "more":
            if order is None or pool is None:
                ease = world.ease(BATCH)
            else:
                ease = pool[order[test.num_queries : test.num_queries + BATCH]]
                if not len(ease):
                    break
            new, old = world.rewards(ease, effect), world.rewards(ease, incumbent)
            rollouts += 2 * len(ease)
            test.update(new - old)
        if acceptance.close(test):
            is_false |= effect <= incumbent
            incumbent = float(effect)
    return Outcome(is_false, incumbent > 0.0, rollouts)


def race(world: World) -> Outcome:
    """All candidates at once on the same queries."""
    effects = np.append(0.0, world.effects)
    running = Race(len(effects), ALPHA, 1.0, EFFECT)
    is_false, rollouts, met = False, 0, 0
    while not running.is_over and met < LIMIT:
        ease = world.ease(BATCH)
        scores = np.full((len(effects), BATCH), np.nan)
        for each in running.left:
            scores[each] = world.rewards(ease, float(effects[each]))
        rollouts += BATCH * len(running.left)
        before = running.incumbent
        running.update(scores, list(range(met, met + BATCH)))
        met += BATCH
        if running.incumbent != before:
            is_false |= bool(effects[running.incumbent] <= effects[before])
    return Outcome(is_false, bool(effects[running.incumbent] > 0.0), rollouts)


def gepa(world: World) -> Outcome:
    """GEPA's default rule: a higher sum on one minibatch."""
    incumbent, is_false, rollouts = 0.0, False, 0
    for effect in world.effects:
        ease = world.ease(MINIBATCH)
        new, old = world.rewards(ease, effect), world.rewards(ease, incumbent)
        rollouts += 2 * MINIBATCH
        if sum(new) > sum(old):
            is_false |= effect <= incumbent
            incumbent = float(effect)
    return Outcome(is_false, incumbent > 0.0, rollouts)


RULES: dict[str, Callable[[World], Outcome]] = {
    "fresh": one_by_one,
    "reuse": lambda world: one_by_one(world, reuse=True),
    "race": race,
    "gepa": gepa,
}


def worlds(kind: str, runs: int, candidates: int, seed: int) -> list[World]:
    """The worlds of a cell, the same for every rule but for what they draw."""
    made = []
    for run in range(runs):
        draw = np.random.default_rng([seed, run])
        effects = np.zeros(candidates)
        if kind == "better":
            effects[draw.integers(candidates)] = EFFECT
        made.append(World(effects, draw))
    return made


def testing_on_everything(candidates: int, power: float) -> float:
    """Answers that a fixed-size test of all candidates draws for this power."""
    low, high = EASE
    ease = np.linspace(low, high, 10_001)
    variance = np.mean(ease * (1 - ease) + (ease + EFFECT) * (1 - ease - EFFECT))
    power = min(power, 0.999)
    z = stats.norm.ppf(1 - ALPHA / candidates) + stats.norm.ppf(power)
    return float((candidates + 1) * math.ceil(z**2 * variance / EFFECT**2))


def cell(rule: str, kind: str, runs: int, candidates: int, seed: int) -> dict[str, Any]:
    """Rates of one rule in one kind of world, with their 95% Clopper-Pearson intervals."""
    outcomes = [RULES[rule](world) for world in worlds(kind, runs, candidates, seed)]
    wrong = sum(outcome.is_false for outcome in outcomes)
    found = sum(outcome.is_found for outcome in outcomes)
    rollouts = float(np.mean([outcome.rollouts for outcome in outcomes]))
    row: dict[str, Any] = {
        "rule": rule,
        "world": kind,
        "runs": runs,
        "candidates": candidates,
        "false_accept_rate": wrong / runs,
        "false_accept_interval": interval(wrong, runs),
        "rollouts": rollouts,
    }
    if kind == "better":
        row["power"] = found / runs
        row["power_interval"] = interval(found, runs)
        if rule != "gepa":
            row["rollouts_ratio"] = rollouts / testing_on_everything(candidates, found / runs)
    return row


def interval(count: int, runs: int) -> list[float]:
    """95% Clopper-Pearson interval of a rate."""
    found = stats.binomtest(count, runs).proportion_ci(0.95, "exact")
    return [float(found.low), float(found.high)]


def main() -> None:
    """Simulate all cells, print one line each, and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--runs", type=int, default=2_000, help="runs per cell")
    parser.add_argument("--candidates", type=int, default=20, help="proposals per run")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    cells = []
    for kind in ("equal", "better"):
        for rule in RULES:
            start = time.perf_counter()
            runs = math.ceil(given.runs / 4) if rule == "race" else given.runs
            cells.append(cell(rule, kind, runs, given.candidates, given.seed))
            row = {k: v for k, v in cells[-1].items() if isinstance(v, float | str)}
            seconds = round(time.perf_counter() - start)
            sys.stdout.write(f"{json.dumps(row)} ({seconds} s)\n")
            sys.stdout.flush()
    ours = [row for row in cells if row["rule"] != "gepa"]
    better = [row for row in ours if row["world"] == "better"]
    result = {
        "false_accept_rate": max(row["false_accept_rate"] for row in ours),
        "stated_rate": ALPHA,
        "power": min(row["power"] for row in better),
        "gepa_false_accept_rate": next(
            row["false_accept_rate"] for row in cells if row["rule"] == "gepa"
        ),
        "rollouts_ratio": max(row["rollouts_ratio"] for row in better),
        "cells": cells,
    }
    given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
