"""Learning curves: TRL + PEFT prompt tuning against rlprompt, same reward, samples and init text.

    python scripts/bench_learning.py [--json FILE] [--plot FILE.svg] [--seeds 3]

Both sides learn 16 soft tokens from the same text with the same reward (a length reward: minus the
tokens of a completion over 24, in units of 8), the same queries and completions per
step, AdamW with the same learning rate and clipping, and no KL. The held-out reward of both is
measured on the same queries with the same sampling. TRL trains `--peer-steps`, rlprompt `--steps`
(the goal forbids a collapse afterwards).

    steps_to_peer_final_ratio  rlprompt's first step whose mean held-out reward reaches TRL's last
                               one, divided by TRL's steps                    (goal: at most 1/3)
    collapsed                  whether rlprompt's mean reward, once it has reached TRL's last one,
                               ever falls below it again by more than two standard errors
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REWARD = "scripts/peers/length_reward.py:length_reward"
SIDES = {"trl": "trl_grpo", "rlprompt": "rlprompt_grpo"}


def write_queries(folder: Path, heldout: int) -> tuple[Path, Path]:
    """Train and held-out queries of `everyday.jsonl` as files."""
    rows = (ROOT / "recipes/data/everyday.jsonl").read_text(encoding="utf-8").splitlines()
    paths = []
    for split, limit in (("train", None), ("heldout", heldout)):
        kept = [row for row in rows if json.loads(row)["split"] == split][:limit]
        paths.append(folder / f"{split}.jsonl")
        paths[-1].write_text("\n".join(kept) + "\n", encoding="utf-8")
    return paths[0], paths[1]


def train(side: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one side with one seed in a process of its own."""
    queries, heldout = write_queries(folder, options.heldout)
    steps = options.peer_steps if side == "trl" else options.steps
    result = folder / f"{side}_{seed}.json"
    flags = {
        "model": options.model,
        "queries": queries,
        "heldout": heldout,
        "reward": REWARD,
        "steps": steps,
        "eval-every": options.eval_every,
        "seed": seed,
        "lr": options.lr,
        "max-new-tokens": options.max_new_tokens,
        "json": result,
        "init-text": options.init_text,
        "heldout-samples": options.heldout_samples,
    }
    if options.threads:
        flags["threads"] = options.threads
    command = [sys.executable, "-m", f"scripts.peers.{SIDES[side]}"]
    for key, value in flags.items():
        command += [f"--{key}", str(value)]
    print(f"{side}, seed {seed}: {steps} steps", file=sys.stderr, flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    loaded: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return loaded


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
    reached = next((i for i, point in enumerate(ours) if point["reward"] >= goal), None)
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


def main() -> None:
    """Train all seeds of both sides, print, plot, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--plot", type=Path, help="where the curves are drawn (.svg or .png)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peer-steps", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eval-every", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--heldout", type=int, default=40, help="held-out queries")
    parser.add_argument("--heldout-samples", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--init-text", default="You are a helpful assistant.")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each side")
    parser.add_argument("--together", action="store_true", help="train two runs at the same time")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from rlprompt.model.fetch import fetch

    options.model = str(fetch("smollm2-135m"))
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(2 if options.together else 1) as pool,
    ):
        jobs = [(side, seed) for seed in range(options.seeds) for side in SIDES]
        done = pool.map(lambda job: train(*job, options, Path(folder)), jobs)
        for (side, _), run in zip(jobs, done, strict=True):
            runs[side].append(run)
    curves = {side: mean_curve(results) for side, results in runs.items()}
    result = {**compare(curves["trl"], curves["rlprompt"]), "curves": curves}
    for key, value in result.items():
        if key != "curves":
            print(f"{key:28}{value}")
    if options.plot:
        plot(curves, options.plot)
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items()}
        content = {**result, "settings": settings, "runs": runs}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
