"""Queries with verifiable answers, made by reasoning-gym, for reward_models/task/reasoning.py.

    python experiments/make_reasoning_data.py chain_sum --size 200 --output sums.jsonl

Rows have the columns query, task, answer, metadata and split; equal arguments give equal rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


def make_rows(task: str, size: int, seed: int, heldout: float) -> list[dict[str, Any]]:
    """Rows of one generator; the last `heldout` share of them is the validation split."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, size=size, seed=seed)
    first_heldout = size - round(heldout * size)
    return [
        {
            "query": entry["question"],
            "task": task,
            "answer": entry["answer"],
            "metadata": entry["metadata"],
            "split": "validation" if index >= first_heldout else "train",
        }
        for index, entry in enumerate(dataset)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", help="a generator of reasoning-gym, such as chain_sum")
    parser.add_argument("--size", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heldout", type=float, default=0.25, help="share of held-out rows")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    if importlib.util.find_spec("reasoning_gym") is None:
        sys.exit("error: reasoning-gym is not installed; run `pip install 'rlprompt[rules]'`")
    rows = make_rows(given.task, given.size, given.seed, given.heldout)
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    given.output.write_text("".join(lines), encoding="utf-8")
    sys.stderr.write(f"{len(rows)} rows in {given.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
