"""Methods and representations at equal time: runs what is missing, records it, goes on.

    python experiments/compare.py --recipes concise topics --seeds 0 1 2 --seconds 180

Every run is `rlprompt train` of a recipe in the repository with overrides; the command is part of
its row in `docs/results/results.jsonl`. A method may train for `--seconds` (evaluation and loading
not counted), by the CPU's clock with one thread, so that other work on the machine does not decide
who wins; the learning rate falls with the time. Held-out queries are seen before and after training
only, and no checkpoint is chosen by them. The hand-written text is the best of those in
`recipes/data/handwritten.json` by the reward on training queries (`experiments/pick_text.py`, which
runs first where it has not run).

Finished runs are skipped and interrupted ones resumed. `python experiments/results.py render`
writes the table.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.results import ROOT, evaluations, kept, put_row, read_run
from rlprompt.runs.stop_reason import StopReason

TEXTS = ROOT / "recipes" / "data" / "handwritten.json"
PICKED = ROOT / "docs" / "results" / "handwritten.json"


@dataclass(frozen=True)
class Method:
    """A recipe file and another representation in place of its soft prompt."""

    file: str
    prompt: str = "soft"


METHODS = {
    **{
        f"{algorithm}-{prompt}": Method(f"smollm2_{algorithm}", prompt)
        for algorithm in ("grpo", "ppo")
        for prompt in ("soft", "prefix", "adapter")
    },
    "supervised-soft": Method("smollm2_supervised"),
    "distill-soft": Method("smollm2_distill"),
}


def best_text(recipe: str) -> str:
    """The text that did best on training queries."""
    known = json.loads(PICKED.read_text(encoding="utf-8")) if PICKED.exists() else {}
    wanted = json.loads(TEXTS.read_text(encoding="utf-8"))[recipe]
    if {row["text"] for row in known.get(recipe, {}).get("texts", ())} != set(wanted):
        path = f"recipes/{recipe}/smollm2_grpo.yaml"
        command = [sys.executable, "experiments/pick_text.py", path, str(TEXTS.relative_to(ROOT))]
        subprocess.run(command, cwd=ROOT, check=True)
        known = json.loads(PICKED.read_text(encoding="utf-8"))
    return str(known[recipe]["texts"][0]["text"])


def command_of(recipe: str, method: Method, seed: int, seconds: float) -> tuple[str, list[str]]:
    """The recipe's path, and the overrides of a run."""
    path = f"recipes/{recipe}/{method.file}.yaml"
    plain = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    overrides = [
        f"seed={seed}",
        "model.threads=1",
        f"training.max_seconds={seconds:g}",
        "training.clock=cpu",
        "training.steps=100000",
        "evaluation.every=100000",
        f"evaluation.handwritten={json.dumps(best_text(recipe))}",
    ]
    text = json.dumps(plain["prompt"]["init_text"])
    if method.prompt == "prefix":
        overrides.append(f"prompt={{type: prefix, init_text: {text}}}")
    elif method.prompt == "adapter":
        overrides.append(f"prompt={{type: adapter, text: {text}}}")
    return path, overrides


def is_finished(folder: Path) -> bool:
    """Whether a run needs no more steps."""
    path = folder / "summary.json"
    if not path.is_file():
        return False
    reason = StopReason.parse(json.loads(path.read_bytes())["stopped_because"])
    return reason is not None and reason.is_complete


def compare(recipe: str, name: str, seed: int, seconds: float) -> None:
    """Run one cell where it is missing, and record it."""
    path, overrides = command_of(recipe, METHODS[name], seed, seconds)
    folder = ROOT / "runs" / "compare" / f"{recipe}-{name}-{seed}-{seconds:g}s"
    if not is_finished(folder):
        resume = ["--resume"] if (folder / "recipe.resolved.yaml").exists() else []
        command = [sys.executable, "-m", "rlprompt", "train", path, *overrides]
        subprocess.run([*command, "--output", str(folder), *resume], cwd=ROOT, check=True)
    row = read_run(folder, path)
    row["command"] = shlex.join(["rlprompt", "train", path, *overrides])
    row["comparison"] = {"name": recipe, "method": name, "seconds": seconds, "clock": "cpu"}
    last = evaluations(folder)[-1]
    row["heldout"]["learned"] = kept(last)
    row["heldout_reward_learned"], row["kl"] = last["reward"], last["base_kl"]
    row["handwritten"] = best_text(recipe)
    put_row(row)


def main() -> None:
    """Run the cells that were asked for, seed by seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["concise", "topics"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=180.0)
    options = parser.parse_args()
    for seed in options.seeds:
        for recipe in options.recipes:
            for name in options.methods:
                compare(recipe, name, seed, options.seconds)


if __name__ == "__main__":
    main()
