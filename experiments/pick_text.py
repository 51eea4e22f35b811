"""Which of several hand-written system prompts is best, by a recipe's reward on TRAIN queries.

    python experiments/pick_text.py recipes/concise/smollm2_grpo.yaml recipes/data/handwritten.json

The held-out queries stay unseen, so that the text chosen here and a learned prompt are compared on
equal terms. All texts meet the same queries and draws. Writes `docs/results/handwritten.json`: for
each recipe folder the texts with their rewards, best first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlprompt.data import load_queries
from rlprompt.evaluation.heldout import HeldoutEvaluator
from rlprompt.prompts.text import TextPrompt
from rlprompt.recipe.build import build_shared
from rlprompt.recipe.schema import load_recipe
from rlprompt.rewards import build_rewards

ROOT = Path(__file__).resolve().parent.parent
PICKED = ROOT / "docs" / "results" / "handwritten.json"


def rewards_of(recipe_path: Path, texts: list[str], overrides: list[str]) -> list[dict[str, Any]]:
    """The texts with their mean reward on training queries, best first."""
    recipe = load_recipe(recipe_path, overrides)
    shared = build_shared(recipe, recipe_path.parent)
    rewards = build_rewards(recipe.rewards, recipe_path.parent, needs_score=False)
    rewards.bind_policy(shared.policy)
    count = recipe.evaluation.max_queries
    queries = load_queries(recipe.data, recipe_path.parent).train[:count]
    evaluator = HeldoutEvaluator(
        shared.engine,
        rewards,
        queries,
        recipe.sampling,
        completions_per_query=recipe.evaluation.completions_per_query,
        seed=recipe.seed,
        measures={},
    )
    rows = []
    for text in texts:
        metrics = evaluator.evaluate(TextPrompt(text), 0).metrics
        kept = ("reward", "reward_sem", "num_completions")
        rows.append({"text": text, **{key: metrics[key] for key in kept}})
        print(f"{metrics['reward']:.3f} +- {metrics['reward_sem']:.3f}  {text[:70]!r}", flush=True)
    rewards.close()
    return sorted(rows, key=lambda row: -float(row["reward"]))


def main() -> None:
    """Evaluate the texts and write what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("texts", type=Path, help="JSON: recipe folder -> list of texts")
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    name = options.recipe.resolve().parent.name
    texts = json.loads(options.texts.read_text(encoding="utf-8"))[name]
    overrides = [
        f"evaluation.max_queries={options.queries}",
        "evaluation.completions_per_query=1",
        f"model.threads={options.threads}",
    ]
    picked = json.loads(PICKED.read_text(encoding="utf-8")) if PICKED.exists() else {}
    section = options.texts.stem.removeprefix("handwritten").strip("_")
    picked[f"{name}/{section}" if section else name] = {
        "command": f"python experiments/pick_text.py {options.recipe} {options.texts} "
        f"--queries {options.queries}",
        "texts": rewards_of(options.recipe, texts, overrides),
    }
    PICKED.write_text(json.dumps(picked, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
