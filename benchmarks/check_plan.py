"""Compare `rlprompt plan` with what one and two ranks here really allocate and receive.

    python benchmarks/check_plan.py [--json FILE]

SmolLM2 in float32, whole on one rank and in shards on two. Every completion is as long as it may
be, so that the lengths are those of the plan. Memory is what torch's profiler sees, which is what
an allocator of a GPU would count; traffic is the bytes that collectives hand out in a step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from rlprompt.files import read_jsonl
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.files.fetch import model_dir
from rlprompt.planning.plan import plan
from rlprompt.planning.tables import DEVICES, SHAPES
from rlprompt.recipe.schema import Recipe, load_recipe
from tests.fixtures.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "distributed" / "planned.yaml"
RUNS = {
    "1 rank, whole": (1, []),
    "2 ranks, in shards": (2, ["distributed.base=sharded"]),
}
CLOSE = 0.15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the comparison there")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    tokens = query_tokens(load_recipe(RECIPE))
    for name, (ranks, changes) in RUNS.items():
        predicted = predict(load_recipe(RECIPE, changes), ranks, tokens)
        found = measure(ranks, changes)
        for what, value in predicted.items():
            error = value / found[what] - 1 if found[what] else 0.0
            rows.append(
                {"run": name, "what": what, "predicted_mb": value / 1e6,
                 "measured_mb": found[what] / 1e6, "error": error}
            )  # fmt: skip
            print(f"{name:20} {what:8} {value / 1e6:9.1f} {found[what] / 1e6:9.1f} {error:+7.1%}")
    result = {
        "recipe": str(RECIPE.relative_to(ROOT)),
        "query_tokens": tokens,
        "within": CLOSE,
        "worst": max(abs(row["error"]) for row in rows),
        "rows": rows,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(result["worst"] > CLOSE)


def query_tokens(recipe: Recipe) -> int:
    """Mean tokens of a training query with its template."""
    from transformers import AutoTokenizer

    from rlprompt.data import load_queries

    tokenizer = AutoTokenizer.from_pretrained(model_dir(recipe.model.path))
    slot = ChatSlot.from_tokenizer(tokenizer)
    lengths = [
        len(slot.tail_ids(q.messages)) for q in load_queries(recipe.data, RECIPE.parent).train
    ]
    return round(sum(lengths) / len(lengths))


def predict(recipe: Recipe, ranks: int, tokens: int) -> dict[str, float]:
    """Bytes of the plan."""
    made = plan(recipe, SHAPES["135m"], ranks, DEVICES["cpu"], query_tokens=tokens)
    return {
        "at rest": made.memory["base, at rest"],
        "rollout": made.rollout_bytes,
        "update": made.update_bytes,
        "weights": sum(size for part, size in made.traffic.items() if part.startswith("base")),
        "sums": made.traffic.get("gradient and prompt", 0.0),
    }


def measure(ranks: int, changes: list[str]) -> dict[str, float]:
    """Bytes of the last step of a run, the largest of its ranks."""
    with tempfile.TemporaryDirectory() as name:
        output, logs = Path(name) / "run", Path(name) / "logs"
        ended = run_ranks(
            ranks, logs, "train", RECIPE, *changes, "-o", output, RANK_MEASURE="memory"
        )
        assert ended.codes == [0] * ranks, ended.logs
        steps = [read_jsonl(logs / f"rank_{rank}.jsonl") for rank in range(ranks)]
        held = [
            each["base_bytes"]
            for each in json.loads((output / "summary.json").read_text())["ranks"]
        ]
    return {
        "at rest": max(held),
        "rollout": max(h + rank[-1]["rollout"] for h, rank in zip(held, steps, strict=True)),
        "update": max(h + rank[-1]["update"] for h, rank in zip(held, steps, strict=True)),
        "weights": max(rank[-1]["weights"] - rank[-2]["weights"] for rank in steps),
        "sums": max(rank[-1]["sums"] - rank[-2]["sums"] for rank in steps),
    }


if __name__ == "__main__":
    sys.exit(main())
