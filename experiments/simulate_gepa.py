"""What GEPA's own gate and the acceptance test find with the same number of completions.

    python experiments/simulate_gepa.py --json docs/results/gepa_acceptance.json

GEPA runs as `search.type: gepa` does, on rewards of 0 or 1 that are made up. A training query has a
difficulty, uniform between 0.1 and 0.7, which is the chance of a reward under the start text. A
proposal changes its parent's advantage by a normal draw with mean -0.05 and standard deviation
`--sd`: most proposals are worse, as a writer's are. For each budget the true advantage over the
start of the text that the search ends with is averaged over the runs, with the share of runs that
end with a text that is worse than the start.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from rlprompt.prompts.text import TextPrompt  # noqa: E402
from rlprompt.search.base import Candidate, SearchStart, Trial  # noqa: E402
from rlprompt.search.gepa import GEPA, GEPASettings, plan_of  # noqa: E402
from rlprompt.types import Completion, Group, Query  # noqa: E402

EASE = (0.1, 0.7)
DRIFT = -0.05
BUDGETS = (150, 500)
QUERIES = 180
RULES: dict[str, dict[str, Any]] = {
    "minibatch": {},
    "fresh": {"acceptance": "fresh"},
    "fresh, spread": {"acceptance": "fresh", "evidence": {"spread": 1.0}},
}


class Drifting:
    """Proposals whose text is their advantage over the start."""

    origin = "drawn"

    def __init__(self, draw: random.Random, sd: float) -> None:
        self._draw, self._sd = draw, sd

    def __call__(self, parent: str, examples: Sequence[Any], number: int) -> str:
        """See `rlprompt.search.gepa_loop.Propose`."""
        return f"{advantage(parent) + self._draw.gauss(DRIFT, self._sd):.6f} {number}"


def advantage(text: str) -> float:
    """What the text is better than the start by."""
    return 0.0 if text == "start" else float(text.split()[0])


def trial(candidate: Candidate, queries: Sequence[Query], draw: random.Random) -> Trial:
    """One completion of each query."""
    better = advantage(candidate.prompt.init_text)
    rewards = [[float(draw.random() < query.columns["ease"] + better)] for query in queries]
    done = Completion((0,), (0.0,), "", True)
    groups = tuple(Group(query, (done,)) for query in queries)
    return Trial(candidate, groups, torch.tensor(rewards, dtype=torch.float32))


def run(rule: dict[str, Any], seed: int, sd: float) -> list[float]:
    """True advantage of the text believed best at each budget."""
    draw = random.Random(seed)
    queries = [
        Query(({"role": "user", "content": ""},), {"ease": draw.uniform(*EASE)}, index)
        for index in range(QUERIES)
    ]
    given = SearchStart(TextPrompt("start"), seed, None, queries, 3)
    search = GEPA(plan_of(GEPASettings(**rule), given), queries, Drifting(draw, sd))
    calls, found = 0, []
    for budget in BUDGETS:
        while True:
            asked, met = search.ask(), search.wanted_queries
            if calls + len(asked) * len(met) > budget:
                break
            search.tell([trial(candidate, met, draw) for candidate in asked])
            calls += len(asked) * len(met)
        found.append(advantage(search.incumbent.prompt.init_text))
    return found


def main() -> None:
    """Run all rules and write what came of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--sd", type=float, default=0.1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    out: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "rules": {}}
    for name, rule in RULES.items():
        found = [run(rule, seed, options.sd) for seed in range(options.runs)]
        rows = {}
        for place, budget in enumerate(BUDGETS):
            values = [each[place] for each in found]
            mean = sum(values) / len(values)
            spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
            rows[str(budget)] = {
                "advantage": round(mean, 4),
                "sem": round(spread / math.sqrt(len(values)), 4),
                "worse_than_start": sum(v < 0 for v in values) / len(values),
            }
            print(f"{name:14} {budget:5} {rows[str(budget)]}", flush=True)
        out["rules"][name] = rows
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
