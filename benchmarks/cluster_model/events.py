"""The events: ranks that work alone, meet, and wait for each other; and failures of a run."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.cluster_model.job import Floats

WAITING = "waiting"
"""What a rank does that has arrived at a meeting before the last one."""


@dataclass(frozen=True)
class Stage:
    """What every rank does next."""

    kind: str
    """What its seconds are counted as."""
    seconds: Floats
    """Of each rank [W]."""
    is_meeting: bool = False
    """Whether it begins when the last rank has come to it."""


@dataclass(frozen=True)
class Timeline:
    """What became of some stages."""

    seconds: float
    """When the last rank had ended."""
    spent: Mapping[str, float]
    """Seconds of a rank by kind, mean of all ranks; they add up to `seconds`."""


def play(stages: Sequence[Stage], ranks: int) -> Timeline:
    """Let ranks go through stages, each at its own speed.

    Args:
        stages: stages in order, the same for all ranks.
        ranks: the number of ranks, W.
    """
    spent: defaultdict[str, float] = defaultdict(float)
    arrived: defaultdict[int, dict[int, float]] = defaultdict(dict)
    ends: list[float] = []
    queue = [(0.0, rank, 0) for rank in range(ranks)]
    while queue:
        now, rank, place = heapq.heappop(queue)
        if place == len(stages):
            ends.append(now)
            continue
        stage = stages[place]
        if not stage.is_meeting:
            spent[stage.kind] += float(stage.seconds[rank])
            heapq.heappush(queue, (now + float(stage.seconds[rank]), rank, place + 1))
            continue
        arrived[place][rank] = now
        if len(arrived[place]) == ranks:
            for each, came in arrived.pop(place).items():
                spent[WAITING] += now - came
                spent[stage.kind] += float(stage.seconds[each])
                heapq.heappush(queue, (now + float(stage.seconds[each]), each, place + 1))
    end = max(ends)
    spent[WAITING] += sum(end - each for each in ends)
    return Timeline(end, {kind: total / ranks for kind, total in spent.items()})


def goodput(
    block_s: float, failures_per_s: float, restart_s: float, rng: np.random.Generator
) -> float:
    """Share of a run's time that goes into steps that are not lost again.

    Failures come at any time; after one the run starts anew at its last checkpoint.

    Args:
        block_s: the seconds from one checkpoint to the next.
        failures_per_s: the rate of failures; 0 = none.
        restart_s: the seconds from a failure to the first step after it.
        rng: where the times of 2,000 failures come from.

    Raises:
        ValueError: a time is not above 0, or a rate is negative.
    """
    if not block_s > 0 or failures_per_s < 0 or restart_s < 0:
        raise ValueError("goodput wants a block above 0, and no negative rate or restart")
    if failures_per_s == 0.0:
        return 1.0
    kept = passed = 0.0
    for up in rng.exponential(1.0 / failures_per_s, size=2_000):
        kept += math.floor(up / block_s) * block_s
        passed += float(up) + restart_s
    return kept / passed
