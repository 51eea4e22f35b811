"""What a GRPO step costs as prompts, batches and completions grow, and what sharing saves.

    python benchmarks/bench_growth.py [--json FILE] [--plot FILE.svg] [--only growth|large]
        [--repeats 3]

`growth` takes one step of rlprompt (SmolLM2-135M, bf16) at every value of one size while the others
stay at 16 virtual tokens, 32 completions (groups of 8) and 48 tokens: virtual tokens 8 to 512,
completions 8 to 256, completion length 32 to 512. Each point is a process of its own, so that its
peak memory is its own. `large` compares a prompt of 512 tokens over 64 rows of 48 tokens with the
same rows carrying it: forward + backward of transformers with the prompt in front of every row
(`peers/carried.py`), and HF generate with a system message of about 512 tokens.

    prompt_cost      seconds that a prompt's own pass takes longer with 512 tokens than with 16, in
                     a step of 8, of 32 and of 128 completions
    large_*_ratio    the rows that carry the prompt, divided by rlprompt (seconds, peak memory)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.client import Worker, model_folder, write_queries

REWARD = "reward_models/concise.py:reward"
USUAL = {"num-virtual-tokens": 16, "completions": 32, "tokens": 48}
AXES = {
    "num-virtual-tokens": (8, 32, 128, 512),
    "completions": (8, 32, 128, 256),
    "tokens": (32, 128, 256, 512),
}
GROUP_SIZE = 8
LARGE_PROMPT, LARGE_ROWS = 512, 64
FILLER = "Answer every question in one short, complete and friendly sentence. "


def work(sizes: dict[str, int], queries: Path, model: Path) -> dict[str, Any]:
    """Flags of a training step of these sizes."""
    return {
        "model": model,
        "queries": queries,
        "reward": REWARD,
        "num-queries": max(1, sizes["completions"] // GROUP_SIZE),
        "group-size": min(GROUP_SIZE, sizes["completions"]),
        "num-virtual-tokens": sizes["num-virtual-tokens"],
        "max-new-tokens": sizes["tokens"],
        "min-new-tokens": sizes["tokens"],
    }


def timed(module: str, flags: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Median seconds, phases and peak memory of a process that works `repeats` times, warm."""
    worker = Worker(module, module, flags)
    for number in range(repeats + 1):
        worker.step(counts=number > 0)
    worker.quit()
    phases = worker.phases() if "phases" in worker.steps[0] else {}
    return {
        "seconds": statistics.median(step["seconds"] for step in worker.steps),
        "phases": phases,
        "peak_rss_mb": worker.steps[-1]["peak_rss_mb"],
        "ready_rss_mb": worker.ready["rss_mb"],
        "counts": worker.steps[-1]["tokens"],
    }


def growth(queries: Path, model: Path, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """One list of points per size."""
    found: dict[str, list[dict[str, Any]]] = {}
    for axis, values in AXES.items():
        found[axis] = []
        for value in values:
            sizes = {**USUAL, axis: value}
            point = timed("rlprompt_grpo", work(sizes, queries, model), repeats)
            found[axis].append({**sizes, **point})
            peak = f"{point['peak_rss_mb']:.0f} MiB"
            print(f"{axis:20}{value:5} {point['seconds']:8.2f} s  {peak}", file=sys.stderr)
    return found


def prompt_cost(queries: Path, model: Path, repeats: int) -> dict[str, float]:
    """How much longer the prompt's own pass takes with 512 tokens than with 16, by completions."""
    added = {}
    for rows in (8, 32, 128):
        seconds = [
            timed(
                "rlprompt_grpo",
                work({**USUAL, "completions": rows, "num-virtual-tokens": size}, queries, model),
                repeats,
            )["phases"]["prefill"]
            for size in (USUAL["num-virtual-tokens"], LARGE_PROMPT)
        ]
        added[str(rows)] = seconds[1] - seconds[0]
    return added


def large(queries: Path, model: Path, repeats: int) -> dict[str, Any]:
    """A prompt of 512 tokens over 64 rows: shared, and carried by every row."""
    sizes = {**USUAL, "completions": LARGE_ROWS, "num-virtual-tokens": LARGE_PROMPT}
    flags = work(sizes, queries, model)
    ours = timed("rlprompt_grpo", flags, repeats)
    carried = timed("carried", flags, repeats)
    text = FILLER * (LARGE_PROMPT // 12)
    generate = timed(
        "hf_generate",
        {
            "model": model,
            "queries": queries,
            "num-queries": flags["num-queries"],
            "group-size": flags["group-size"],
            "new-tokens": sizes["tokens"],
            "system-text": text,
        },
        repeats,
    )
    learned = sum(ours["phases"][name] for name in ("prefill", "forward", "backward"))
    return {
        "ours": ours,
        "carried": carried,
        "generate": generate,
        "large_learn_ratio": carried["seconds"] / learned,
        "large_rollout_ratio": generate["seconds"] / ours["phases"]["rollout"],
        "large_rss_ratio": carried["peak_rss_mb"] / ours["peak_rss_mb"],
    }


def plot(points: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Seconds and peak memory over each size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"num-virtual-tokens": "virtual tokens", "tokens": "tokens per completion"}
    figure, axes = plt.subplots(2, len(points), figsize=(11, 5.5), squeeze=False)
    for column, (axis, found) in enumerate(points.items()):
        values = [point[axis] for point in found]
        for phase in ("rollout", "forward", "backward", "prefill"):
            seconds = [point["phases"].get(phase, 0.0) for point in found]
            axes[0][column].plot(values, seconds, marker=".", label=phase)
        axes[0][column].plot(values, [p["seconds"] for p in found], marker="o", label="step")
        axes[1][column].plot(values, [p["peak_rss_mb"] for p in found], marker="o", color="black")
        axes[1][column].set_xlabel(labels.get(axis, axis))
        for row in (0, 1):
            axes[row][column].set_xscale("log", base=2)
            axes[row][column].set_ylim(bottom=0)
            axes[row][column].grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("peak memory, MiB")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Measure, print, draw, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--plot", type=Path, help="where the curves are drawn (.svg or .png)")
    parser.add_argument("--repeats", type=int, default=3, help="counted steps per point")
    parser.add_argument("--only", choices=("growth", "large"))
    options = parser.parse_args()
    model = model_folder()
    result: dict[str, Any] = {"usual": USUAL, "repeats": options.repeats}
    with tempfile.TemporaryDirectory() as folder:
        queries = write_queries(Path(folder))
        if options.only != "large":
            result["growth"] = growth(queries, model, options.repeats)
            result["prompt_cost"] = prompt_cost(queries, model, options.repeats)
        if options.only != "growth":
            result |= large(queries, model, options.repeats)
    for key, value in result.items():
        if key == "prompt_cost" or key.endswith("_ratio"):
            print(f"{key:22}{value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot and "growth" in result:
        plot(result["growth"], options.plot)


if __name__ == "__main__":
    main()
