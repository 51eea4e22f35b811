"""Learning curves: TRL + PEFT prompt tuning against rlprompt, same reward, samples and init text.

    python benchmarks/bench_learning.py [--json FILE] [--plot FILE.svg] [--seeds 3] [--runs DIR]

Both sides learn 20 soft tokens from the same text, an instruction, with the same reward, the same
number of queries and completions per step, AdamW with a constant learning rate, TRL's betas and
clipping, advantages divided by the deviation of the batch, and no KL. The task is `recipes/topics`:
name the topic of a message in one word. Its reward (`reward_models/topic_label.py`) pays neither
silence nor a constant answer: a wrong label is worth nothing, and one label for all messages is
right in a fifth of them. The held-out reward of both is measured on the same queries with the
sampling of training.

The learning rate is chosen per side, by the same rule from the same list (`--lrs`): one run of
`--peer-steps` steps each with a seed that is not used again; the highest mean of the last two
held-out evaluations wins. With these rates TRL trains `--peer-steps`, rlprompt `--steps` (the goal
forbids a collapse afterwards).

    steps_to_peer_final_ratio  rlprompt's first step whose mean held-out reward reaches TRL's last
                               one, and keeps it at the next evaluation, divided by TRL's steps
                                                                            (goal: at most 1/3)
    collapsed                  whether rlprompt's mean reward, once it has reached TRL's last one,
                               ever falls below it again by more than two standard errors
    cpu_seconds                of one step, per side: the median over steps and seeds, of all
                               threads, which other work on the machine hardly changes
    cpu_to_peer_final_ratio    CPU seconds of our steps up to that first step, divided by those of
                               all of TRL's

A run whose result lies in `--runs` is not trained again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlprompt.model.files.fetch import fetch

ROOT = Path(__file__).resolve().parent.parent
INIT_TEXT = "Name the topic of the message in one word: Sports, Food, Technology, Travel or Money."
SWEEP_SEED = 100
SIDES = {"trl": "trl_grpo", "rlprompt": "rlprompt_grpo"}


def write_queries(folder: Path, data: Path, heldout: int) -> tuple[Path, Path]:
    """Train and held-out queries of a query set as files."""
    rows = data.read_text(encoding="utf-8").splitlines()
    paths = []
    for split, name, limit in (("train", "train", None), ("validation", "heldout", heldout)):
        kept = [row for row in rows if json.loads(row)["split"] == split][:limit]
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("\n".join(kept) + "\n", encoding="utf-8")
    return paths[0], paths[1]


def train(
    side: str, lr: float, seed: int, steps: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Train one side in a process of its own, or read what an earlier call has trained."""
    folder: Path = options.runs
    queries, heldout = write_queries(folder, options.data, options.heldout)
    flags = {
        "model": options.model,
        "queries": queries,
        "heldout": heldout,
        "reward": options.reward,
        "steps": steps,
        "eval-every": options.peer_eval_every if side == "trl" else options.eval_every,
        "seed": seed,
        "lr": lr,
        "num-queries": options.num_queries,
        "group-size": options.group_size,
        "temperature": options.temperature,
        "max-new-tokens": options.max_new_tokens,
        "init-text": options.init_text,
        "num-virtual-tokens": options.num_virtual_tokens,
        "scale-rewards": "batch",
        "heldout-samples": options.heldout_samples,
    }
    if side == "trl":
        # Same losses, less time: TRL 1.16 sends every position through the LM head on a CPU.
        flags["compact-head"] = None
    else:
        flags["eval-late-every"] = options.eval_late_every
        flags["eval-late-from"] = options.peer_steps
    if options.threads:
        flags["threads"] = options.threads
    digest = hashlib.sha256(repr(sorted(flags.items(), key=str)).encode()).hexdigest()[:8]
    result = folder / f"{side}_lr{lr:g}_seed{seed}_{digest}.json"
    if not result.exists():
        unfinished = result.with_suffix(".part")
        command = [sys.executable, "-m", f"benchmarks.peers.{SIDES[side]}"]
        for key, value in {**flags, "json": unfinished}.items():
            command += [f"--{key}"] if value is None else [f"--{key}", str(value)]
        print(f"{side}, lr {lr:g}, seed {seed}: {steps} steps", file=sys.stderr, flush=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if code := subprocess.run(command, cwd=ROOT, env=environment).returncode:
            sys.exit(f"error: the process of {side} ended with code {code}")
        unfinished.rename(result)
    loaded: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return loaded


def sweep(side: str, options: argparse.Namespace) -> dict[float, float]:
    """Mean of the last two held-out evaluations by learning rate, one run each."""
    scores = {}
    for lr in options.lrs:
        run = train(side, lr, SWEEP_SEED, options.peer_steps, options)
        scores[lr] = statistics.fmean(point["reward"] for point in run["heldout"][-2:])
    return scores


def mean_curve(runs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Held-out reward by step over seeds: mean, and standard error of the mean."""
    curves = [{point["step"]: point["reward"] for point in run["heldout"]} for run in runs]
    out = []
    for step in curves[0]:
        rewards = [curve[step] for curve in curves]
        spread = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
        out.append(
            {
                "step": step,
                "reward": statistics.fmean(rewards),
                "sem": spread / len(rewards) ** 0.5,
            }
        )
    return out


def compare(peer: list[dict[str, float]], ours: list[dict[str, float]]) -> dict[str, Any]:
    """The two numbers of the module docstring; None when TRL's reward is never reached."""
    goal = peer[-1]["reward"]
    above = [point["reward"] >= goal for point in ours]
    stays = [here and after for here, after in zip(above, [*above[1:], True], strict=True)]
    reached = stays.index(True) if any(stays) else None
    after = [] if reached is None else ours[reached:]
    return {
        "peer_final_reward": goal,
        "steps_to_peer_final": None if reached is None else ours[reached]["step"],
        "steps_to_peer_final_ratio": (
            None if reached is None else ours[reached]["step"] / peer[-1]["step"]
        ),
        "collapsed": reached is None
        or any(point["reward"] + 2 * point["sem"] < goal for point in after),
        "our_final_reward": ours[-1]["reward"],
        "our_best_reward": max(point["reward"] for point in ours),
    }


def costs(runs: dict[str, list[dict[str, Any]]], reached: int | None) -> dict[str, Any]:
    """CPU seconds per step, and what it took to reach TRL's last reward."""
    steps = {side: [step for run in found for step in run["steps"]] for side, found in runs.items()}
    medians = {
        side: statistics.median(step["cpu_seconds"] for step in found)
        for side, found in steps.items()
    }
    theirs = medians["trl"] * len(steps["trl"]) / len(runs["trl"])
    ratio = None if reached is None else reached * medians["rlprompt"] / theirs
    return {"cpu_seconds": medians, "cpu_to_peer_final_ratio": ratio}


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Both curves with their standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    labels = {"trl": "TRL 1.16 + PEFT prompt tuning", "rlprompt": "rlprompt, system slot"}
    for side, curve in curves.items():
        steps = [point["step"] for point in curve]
        mean = [point["reward"] for point in curve]
        axes.plot(steps, mean, label=labels[side], marker=".")
        low = [point["reward"] - point["sem"] for point in curve]
        high = [point["reward"] + point["sem"] for point in curve]
        axes.fill_between(steps, low, high, alpha=0.2)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out reward (mean over seeds)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; the model is fetched."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--plot", type=Path, help="where the curves are drawn (.svg or .png)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peer-steps", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eval-every", type=int, default=2, help="rlprompt, up to peer steps")
    parser.add_argument("--eval-late-every", type=int, default=5, help="rlprompt, after them")
    parser.add_argument("--peer-eval-every", type=int, default=4)
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.003, 0.01, 0.03])
    parser.add_argument("--num-queries", type=int, default=8, help="queries per step")
    parser.add_argument("--group-size", type=int, default=8, help="completions per query")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--reward", default="reward_models/topic_label.py:reward")
    parser.add_argument("--heldout", type=int, default=40, help="held-out queries")
    parser.add_argument("--heldout-samples", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=4)
    parser.add_argument("--init-text", default=INIT_TEXT)
    parser.add_argument("--num-virtual-tokens", type=int, default=20)
    parser.add_argument("--data", type=Path, default=ROOT / "recipes/data/topics.jsonl")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each side")
    parser.add_argument("--runs", type=Path, help="keeps finished runs; none = a temporary folder")
    options = parser.parse_args(argv)
    options.model = str(fetch("smollm2-135m"))
    return options


def main() -> None:
    """Train all seeds of both sides, print, plot, and write the JSON."""
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        options.runs = (options.runs or Path(temporary)).absolute()
        options.runs.mkdir(parents=True, exist_ok=True)
        report(options)


def report(options: argparse.Namespace) -> None:
    """Run everything; print, plot and write the result."""
    sweeps = {side: sweep(side, options) for side in SIDES}
    lrs = {side: max(scores, key=lambda lr: scores[lr]) for side, scores in sweeps.items()}
    steps = {"trl": options.peer_steps, "rlprompt": options.steps}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for seed in range(options.seeds):
        for side in SIDES:
            runs[side].append(train(side, lrs[side], seed, steps[side], options))
    curves = {side: mean_curve(results) for side, results in runs.items()}
    result = {**compare(curves["trl"], curves["rlprompt"]), "lr": lrs, "sweep": sweeps}
    result |= costs(runs, result["steps_to_peer_final"])
    for key, value in result.items():
        print(f"{key:28}{value}")
    if options.plot:
        plot(curves, options.plot)
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items()}
        content = {**result, "curves": curves, "settings": settings, "runs": runs}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
