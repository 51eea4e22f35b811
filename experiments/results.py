"""docs/results/results.jsonl (one row per run) and docs/results.md (made from it).

python experiments/results.py add RUN_DIR ... --recipe recipes/concise/smollm2_grpo.yaml
    append the finished runs in these folders to docs/results/results.jsonl (a run of the same
    recipe, method and seed is replaced) and keep ten held-out answers of the first one;
    `--overrides` names what else the command line had
python experiments/results.py render
    write docs/results.md

A row with `comparison` is a cell of the table that `experiments/compare.py` fills; a row of a
recipe in `recipes/distill` is about a teacher. `results_tables.py` renders both.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import certify_recipes, equal_calls, forecast_gains
from experiments.results_tables import (
    best_section,
    cell,
    comparison_section,
    distillation_section,
    spread,
)

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "docs" / "results" / "results.jsonl"
ANSWERS = ROOT / "docs" / "results" / "results.answers.json"
PAGE = ROOT / "docs" / "results.md"
KEY = ("recipe", "method", "representation", "seed", "comparison")
HELDOUT = (
    "reward_sem",
    "rewards",
    "mean_length",
    "terminated_share",
    "base_logprob",
    "base_kl",
    "teacher_kl",
    "num_completions",
)
WHO = {"base": "base", "handwritten": "hand-written", "learned": "learned"}


def read_run(folder: Path, recipe: str) -> dict[str, Any]:
    """One row of results.jsonl from a run folder."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    resolved = yaml.safe_load((folder / "recipe.resolved.yaml").read_text(encoding="utf-8"))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    seed = resolved["seed"]
    best = [row for row in metrics if row["step"] <= max(1, summary["best_step"])][-1]
    heldout = summary["heldout"]
    return {
        "recipe": recipe,
        "method": resolved["algorithm"]["type"],
        "representation": resolved["prompt"]["type"],
        "seed": seed,
        "heldout_reward_base": summary["heldout_reward_before"],
        "heldout_reward_handwritten": summary["heldout_reward_handwritten"],
        "heldout_reward_learned": summary["heldout_reward_after"],
        "kl": best.get("kl"),
        "seconds": round(summary["seconds"], 1),
        "budget_seconds": resolved["training"].get("max_seconds"),
        "steps": summary["steps"],
        "best_step": summary["best_step"],
        "command": f"rlprompt train {recipe} seed={seed}{_threads(resolved)}",
        "handwritten": resolved["evaluation"]["handwritten"],
        "heldout": {who: kept(heldout[who]) for who in WHO if who in heldout},
        "base_unchanged": summary["base_fingerprint_before"] == summary["base_fingerprint_after"],
    }


def kept(metrics: dict[str, Any]) -> dict[str, Any]:
    """What a row keeps of an evaluation."""
    return {key: metrics[key] for key in HELDOUT if key in metrics}


def evaluations(folder: Path, who: str = "learned") -> list[dict[str, Any]]:
    """A prompt's held-out evaluations, oldest first."""
    rows = [json.loads(line) for line in (folder / "evaluation.jsonl").open(encoding="utf-8")]
    return [row for row in rows if row["who"] == who]


def _threads(resolved: dict[str, Any]) -> str:
    threads = resolved["model"]["threads"]
    return "" if threads is None else f" model.threads={threads}"


def answers_of(folder: Path, best_step: int, count: int = 10) -> list[dict[str, str]]:
    """Held-out answers side by side: the first completion of each of the first queries."""
    rows = [json.loads(line) for line in (folder / "completions.jsonl").open(encoding="utf-8")]
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        if row["split"] != "heldout" or (row["who"] == "learned" and row["step"] != best_step):
            continue
        score = "" if row["reward"] is None else f"({row['reward']:.2f}) "
        found[row["query"]].setdefault(row["who"], score + row["completion"])
    return [{"query": query, **texts} for query, texts in list(found.items())[:count]]


def is_distilled(row: dict[str, Any]) -> bool:
    """Whether the row is about a teacher, in `recipes/distill`."""
    return str(row["recipe"]).startswith("recipes/distill/")


def put_row(row: dict[str, Any]) -> None:
    """Add a row to results.jsonl, in place of an older one of the same run.

    Several processes may do so at a time.
    """
    with ROWS.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        rows = [json.loads(line) for line in file]
        rows = [old for old in rows if any(old.get(key) != row.get(key) for key in KEY)] + [row]
        rows.sort(key=lambda row: [str(row.get(key)) for key in KEY])
        file.truncate(0)
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def add(folders: list[Path], recipe: str, overrides: list[str]) -> None:
    """Put runs into results.jsonl."""
    answers = json.loads(ANSWERS.read_text(encoding="utf-8")) if ANSWERS.exists() else {}
    for number, folder in enumerate(folders):
        row = read_run(folder, recipe)
        row["command"] = " ".join([row["command"], *overrides])
        if is_distilled(row):
            row["heldout"]["start"] = kept(evaluations(folder)[0])
        put_row(row)
        if number == 0:
            answers[recipe] = answers_of(folder, row["best_step"])
    ANSWERS.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")


def section(recipe: str, rows: list[dict[str, Any]], answers: list[dict[str, str]]) -> list[str]:
    """One recipe: its table of held-out means, and ten answers."""
    seeds = ", ".join(str(row["seed"]) for row in rows)
    names = list(rows[0]["heldout"]["base"]["rewards"])
    lines = [
        f"## {recipe}",
        "",
        f"Seeds {seeds}; mean ± standard deviation over seeds "
        f"({rows[0]['heldout']['base']['num_completions']} held-out completions each). Commands:",
        "",
        *(f"    {row['command']}" for row in rows),
        "",
        f"Hand-written: *{cell(rows[0]['handwritten'])}*",
        "",
        "| | reward | " + " | ".join(names) + " | tokens | ended | log-prob under the base |",
        "|---" * (len(names) + 5) + "|",
    ]
    for who, label in WHO.items():
        held = [row["heldout"][who] for row in rows]
        values = [
            spread([row[f"heldout_reward_{who}"] for row in rows]),
            *(spread([h["rewards"][name] for h in held]) for name in names),
            spread([h["mean_length"] for h in held]),
            spread([h["terminated_share"] for h in held]),
            spread([h["base_logprob"] for h in held]),
        ]
        lines.append(f"| {label} | " + " | ".join(values) + " |")
    better = all(
        row["heldout_reward_learned"]
        > max(row["heldout_reward_base"], row["heldout_reward_handwritten"])
        for row in rows
    )
    known = [row["kl"] for row in rows if row["kl"] is not None]
    lines += [
        "",
        f"Learned above base and hand-written in every seed: {'yes' if better else 'no'}; best "
        f"step {', '.join(str(row['best_step']) for row in rows)} of {rows[0]['steps']}; seconds "
        f"{', '.join(str(round(row['seconds'])) for row in rows)}"
        + (f"; KL to the base at the best step {spread(known)}" if known else "")
        + "; base fingerprint unchanged: "
        + ("yes." if all(row["base_unchanged"] for row in rows) else "no."),
        "",
        "| held-out query | base | hand-written | learned |",
        "|---|---|---|---|",
    ]
    for answer in answers:
        texts = (cell(answer.get(key, "")) for key in ("query", *WHO))
        lines.append("| " + " | ".join(texts) + " |")
    return [*lines, ""]


def render() -> None:
    """Write results.md."""
    rows = [json.loads(line) for line in ROWS.open(encoding="utf-8")]
    answers = json.loads(ANSWERS.read_text(encoding="utf-8"))
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row.get("comparison") is None and not is_distilled(row):
            groups[row["recipe"]].append(row)
    lines = [
        "# Results",
        "",
        "Made by `python experiments/results.py render` from `docs/results/results.jsonl`; "
        "do not edit. Base = the frozen model as its template renders a conversation without a "
        "system message. All three prompts meet the same queries, sampling and seed. The learned "
        "prompt is the one that did best on these held-out queries in training, which flatters it "
        "a little. The ten answers are the first ten held-out queries of the first seed, not "
        "chosen; their reward is in brackets.",
        "",
    ]
    compared = [row for row in rows if row.get("comparison") is not None]
    lines += best_section(compared)
    for recipe, group in groups.items():
        lines += section(recipe, group, answers[recipe])
    lines += distillation_section([row for row in rows if is_distilled(row)])
    lines += comparison_section(compared)
    lines += equal_calls.page_section()
    lines += forecast_gains.page_section()
    lines += certify_recipes.page_section()
    PAGE.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """Add runs, or render."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    adder = commands.add_parser("add")
    adder.add_argument("folders", nargs="+", type=Path)
    adder.add_argument("--recipe", required=True)
    adder.add_argument("--overrides", nargs="*", default=[], help="others than seed and threads")
    commands.add_parser("render")
    options = parser.parse_args()
    if options.command == "add":
        add(options.folders, options.recipe, options.overrides)
    else:
        render()


if __name__ == "__main__":
    main()
