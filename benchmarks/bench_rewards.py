"""What reward plumbing costs: everything around the rewards' own code, as a share of a step.

    python benchmarks/bench_rewards.py --json rewards.json

`plumbing_seconds` is the time of `RewardRunner.score` and `training_rewards` for one batch minus
what the rewards themselves report (arguments, threads, checks, combination, metrics). A step is
what training takes for a batch of that size: by default the measured step on two CPU cores;
`--step-seconds` gives another. `overhead_share` is plumbing over step, of the worst set of rewards.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlprompt.rewards import RewardRunner, RewardSettings, build_rewards
from rlprompt.types import Completion, Group, Query

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.02
ISOLATED = "isolated"
"""The set that runs in a worker process; what its reward itself takes is measured by set "one"."""
STEP_SECONDS = 2.6
"""Seconds of a step of 32 completions x 48 tokens on 2 cores (docs/results/bench_peers.json)."""
WORDS = "A volcano is an opening where molten rock leaves the Earth , and many of them sleep . " * 3


def recipes() -> dict[str, list[RewardSettings]]:
    """Sets of rewards, from one that does nothing to as many as a careful recipe has."""
    many: list[dict[str, Any]] = [
        {"path": "reward_models/concise.py:reward", "name": "concise", "normalise": "running"},
        {"path": "builtin:diversity", "weight": 0.1},
        {"path": "reward_models/safety/private_data.py:reward", "name": "private", "role": "gate"},
        {
            "path": "reward_models/safety/harmful_compliance.py:reward",
            "name": "harm",
            "role": "constraint",
            "limit": 0.95,
            "bound": "at_least",
        },
        {"path": "builtin:relevance", "role": "metric"},
        {"path": "builtin:repetition", "role": "metric"},
        {"path": "builtin:sentence", "role": "metric"},
    ]
    sets = {
        "one": [many[0]],
        "seven": many,
        "no timeout": [{**many[0], "timeout": None}],
        ISOLATED: [{**many[0], "isolation": {}}],
    }
    return {
        name: [RewardSettings.model_validate(each) for each in rewards]
        for name, rewards in sets.items()
    }


def batch(queries: int, group_size: int, tokens: int) -> list[Group]:
    """Groups of completions of the given length, all different."""
    words = WORDS.split()
    groups = []
    for number in range(queries):
        message = {"role": "user", "content": f"What is volcano number {number}?"}
        completions = []
        for copy in range(group_size):
            text = " ".join(words[(copy + i) % len(words)] for i in range(tokens))
            ids = tuple(range(copy, copy + tokens))
            completions.append(Completion(ids, (-1.0,) * tokens, text, True))
        groups.append(Group(Query((message,), {"want": "refuse"}, number), tuple(completions)))
    return groups


def measure(runner: RewardRunner, groups: list[Group], repeats: int) -> dict[str, float]:
    """Medians over batches, after one to warm up."""
    totals, owns = [], []
    for step in range(repeats + 1):
        start = time.perf_counter()
        scored = runner.score(groups, step=step)
        runner.training_rewards(scored)
        total = time.perf_counter() - start
        own = sum(value for key, value in scored.metrics.items() if key.endswith("/seconds"))
        if step:
            totals.append(total)
            owns.append(own)
    plumbing = [total - own for total, own in zip(totals, owns, strict=True)]
    return {
        "total_seconds": statistics.median(totals),
        "rewards_own_seconds": statistics.median(owns),
        "plumbing_seconds": statistics.median(plumbing),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--step-seconds", type=float, default=STEP_SECONDS)
    given = parser.parse_args()
    groups = batch(given.queries, given.group_size, given.tokens)
    results: dict[str, Any] = {}
    for name, settings in recipes().items():
        runner = build_rewards(settings, ROOT)
        row = measure(runner, groups, given.repeats)
        runner.close()
        if name == ISOLATED:
            row["rewards_own_seconds"] = results["one"]["rewards_own_seconds"]
            row["plumbing_seconds"] = row["total_seconds"] - row["rewards_own_seconds"]
        row["overhead_share"] = row["plumbing_seconds"] / given.step_seconds
        results[name] = row
        sys.stdout.write(
            f"{name:12} {1e3 * row['plumbing_seconds']:8.2f} ms plumbing, "
            f"{1e3 * row['rewards_own_seconds']:8.2f} ms rewards, "
            f"{row['overhead_share']:.3%} of a step of {given.step_seconds:g} s\n"
        )
    worst = max(row["overhead_share"] for row in results.values())
    report = {
        "overhead_share": worst,
        "goal": GOAL,
        "met": worst < GOAL,
        "step_seconds": given.step_seconds,
        "completions": given.queries * given.group_size,
        "tokens": given.tokens,
        "torch": torch.__version__,
        "sets": results,
    }
    if given.json:
        given.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if report["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
