"""Parts that measure: the machine's peaks, a GRPO step against TRL + PEFT, and where decoding goes.

Every side of a comparison gets a model of its own, made anew on the device, so that nothing of one
is left in the other's memory figure. All do the same work: fixed completion lengths, no early stop.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.correct import START, SYSTEM, TEXTS, queries
from benchmarks.gpu.shapes import byte_tokenizer
from benchmarks.gpu.world import World
from benchmarks.peers.worker import conversation
from rlprompt.algorithms.grpo import GRPO, GRPOSettings
from rlprompt.engines.native import NativeEngine, NativeSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.in_memory import base_in_memory
from rlprompt.policy import Policy
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.rewards import RewardSettings, build_rewards
from rlprompt.rollout.collect import collect
from rlprompt.training.optimizer import build_optimizer
from rlprompt.training.settings import OptimizerSettings
from rlprompt.training.update import PhaseClock, Updater

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "peft", "trl", "datasets", "pydantic")


@dataclass(frozen=True)
class Work:
    """One step, alike for every side."""

    queries: int
    group: int
    tokens: int
    virtual: int = 16
    repeats: int = 2
    """Timed steps, after one that warms up."""

    @property
    def completion_tokens(self) -> int:
        return self.queries * self.group * self.tokens


WORK = {"llama-3.2-1b": Work(8, 8, 128), "qwen3-8b": Work(8, 8, 64, repeats=1)}
TINY_WORK = Work(2, 2, 4, virtual=4, repeats=1)


def even(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    """The share of even token ids: a reward that costs nothing."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def machine(world: World) -> dict[str, Any]:
    """Versions, the device, and its peaks as PyTorch reaches them."""
    world.require_device()
    versions = {name: _version(name) for name in PACKAGES}
    figures: dict[str, Any] = {"python": platform.python_version(), "versions": versions}
    size, side = (2**20, 128) if world.dry_run else (2**32, 8192)
    figures["copy_bytes_per_second"] = _copy_rate(world, size)
    figures["matmul_flops"] = _product_rate(world, side)
    if world.dry_run:
        return figures | {"device": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    return figures | {
        "device": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
    }


def _copy_rate(world: World, size: int) -> float:
    """Bytes read and written per second of a copy of `size` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=world.device)
    target = torch.empty_like(source)
    return 2 * size / _best(world, lambda: target.copy_(source))


def _product_rate(world: World, side: int) -> float:
    """Operations per second of a square matrix product."""
    a, b = (torch.randn(side, side, device=world.device, dtype=world.dtype) for _ in range(2))
    return 2 * side**3 / _best(world, lambda: a @ b)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _best(world: World, work: Callable[[], Any], times: int = 5) -> float:
    return min(world.seconds(work) for _ in range(times + 1))


def step_1b(world: World) -> dict[str, Any]:
    """A GRPO step on the shape of Llama 3.2 1B, ours, TRL's, and HF generate's rollout."""
    return _step(world, "llama-3.2-1b")


def step_8b(world: World) -> dict[str, Any]:
    """The same on the shape of Qwen3 8B."""
    return _step(world, "qwen3-8b")


def _step(world: World, name: str) -> dict[str, Any]:
    world.require_device()
    work = TINY_WORK if world.dry_run else WORK[name]
    figures: dict[str, Any] = {"shape": name, "work": vars(work), "dtype": str(world.dtype)}
    figures["matmul_flops"] = _product_rate(world, 128 if world.dry_run else 8192)
    sides = {"rlprompt": _ours, "trl": _trl, "hf_generate": _hf_generate}
    for side, run in sides.items():
        figures[side] = _side(world, run, name, work)
        mine = figures[side]
        if "flops" in mine:
            mine["share_of_peak"] = mine["flops"] / mine["seconds"] / figures["matmul_flops"]
    ours = figures["rlprompt"]
    if "error" in ours:
        raise RuntimeError(ours["error"])
    for side in ("trl", "hf_generate"):
        if "error" not in figures[side]:
            key = "seconds" if side == "trl" else "rollout_seconds"
            figures[f"{side}_over_rlprompt"] = figures[side][key] / ours[key]
    _draw_step(world, name, figures)
    return figures


def _side(
    world: World, run: Callable[[World, str, Work], dict[str, Any]], name: str, work: Work
) -> dict[str, Any]:
    """One side's figures; a side that cannot run says why and stops nobody else."""
    gc.collect()
    world.fresh_memory()
    start = time.perf_counter()
    try:
        made = run(world, name, work)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    rate = work.completion_tokens / made["rollout_seconds"]
    return made | {
        "rollout_tokens_per_second": rate,
        "peak_gib": world.peak_gib(),
        "whole_part_seconds": time.perf_counter() - start,
    }


def model_policy(world: World, name: str, work: Work) -> Policy:
    """A soft prompt on random weights of a shape."""
    tokenizer = byte_tokenizer()
    base = base_in_memory(world.random_model(name), tokenizer)
    policy = Policy(base, ChatSlot.from_tokenizer(base.tokenizer))
    policy.prompt = SoftPrompt.create(
        SoftSettings(num_virtual_tokens=work.virtual, init_text=START), policy, 0
    )
    return policy


def _ours(world: World, name: str, work: Work) -> dict[str, Any]:
    policy = model_policy(world, name, work)
    engine = NativeEngine(policy, NativeSettings(reuse_mib=0))
    reward = world.scratch / "reward.py"
    reward.write_text("from benchmarks.gpu.speed import even\n", encoding="utf-8")
    rewards = build_rewards([RewardSettings(path=f"{reward}:even", name="even")], Path.cwd())
    grpo = GRPOSettings(group_size=work.group, kl_coef=0.0)
    updater = Updater(policy, GRPO(grpo, work.tokens), None, temperature=1.0, token_budget=1 << 14)
    optimizer = build_optimizer(policy.parameters(), OptimizerSettings(lr=0.01), 0.01)
    sampling = SamplingSettings(max_tokens=work.tokens, min_tokens=work.tokens)
    asked, rollouts, steps = queries(work.queries), [], []

    def step(number: int) -> None:
        engine.sync(policy.prompt)
        batch = collect(
            lambda: engine.generate(asked, work.group, sampling, number), rewards, step=number
        )
        world.synchronize()
        rollouts.append(batch.rollout_seconds)
        updater.learn(batch, optimizer, lambda: 0.01, 1.0, PhaseClock())

    for number in range(work.repeats + 1):
        steps.append(world.seconds(lambda: step(number)))  # noqa: B023 - called here
    count = sum(parameter.numel() for parameter in policy.base.model.parameters())
    return {
        "seconds": statistics.median(steps[1:]),
        "first_step_seconds": steps[0],
        "rollout_seconds": statistics.median(rollouts[1:]),
        "parameters": count,
        # Decoding is 2 per weight and token, an update 2 forward and 2 backward: the weights are
        # frozen. Queries and attention are left out.
        "flops": 6.0 * count * work.completion_tokens,
    }


def _inputs(world: World, work: Work) -> Any:
    chats = [
        conversation(TEXTS[i % len(TEXTS)], SYSTEM)
        for i in range(work.queries)
        for _ in range(work.group)
    ]
    inputs: Any = byte_tokenizer().apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    return inputs.to(world.device)


def _hf_generate(world: World, name: str, work: Work) -> dict[str, Any]:
    model: Any = world.random_model(name)
    inputs = _inputs(world, work)
    times = [
        world.seconds(
            lambda: model.generate(
                **inputs,
                do_sample=True,
                top_k=0,
                min_new_tokens=work.tokens,
                max_new_tokens=work.tokens,
            )
        )
        for _ in range(work.repeats + 1)
    ]
    return {"rollout_seconds": statistics.median(times[1:])}


def _trl(world: World, name: str, work: Work) -> dict[str, Any]:
    missing = [package for package in ("trl", "peft", "datasets") if not _is_there(package)]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not installed (scripts/gpu_wheels.sh)")
    from datasets import Dataset
    from peft import PromptTuningConfig, TaskType
    from transformers import TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    rows = work.queries * work.group
    prompts = [{"prompt": conversation(TEXTS[i % len(TEXTS)])} for i in range(work.queries)]
    arguments = GRPOConfig(
        output_dir=str(world.scratch / "trl"),
        use_cpu=world.dry_run,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows,
        num_generations=work.group,
        max_completion_length=work.tokens,
        generation_kwargs={"min_new_tokens": work.tokens, "use_cache": True},
        beta=0.0,
        loss_type="grpo",
        learning_rate=0.01,
        max_steps=work.repeats + 1,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer: Any = GRPOTrainer(
        model=world.random_model(name),
        reward_funcs=even,
        args=arguments,
        train_dataset=Dataset.from_list(prompts),
        processing_class=byte_tokenizer(),
        peft_config=PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=work.virtual
        ),
    )
    steps: list[float] = []
    rollouts: list[float] = []

    class Clock(TrainerCallback):
        """Seconds of each step, from the end of the one before."""

        def __init__(self) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            world.synchronize()
            steps.append(time.perf_counter() - self.start)
            self.start = time.perf_counter()

    generate = trainer._generate_single_turn

    def timed(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        out = generate(*given, **named)
        world.synchronize()
        rollouts.append(time.perf_counter() - start)
        return out

    trainer._generate_single_turn = timed
    trainer.add_callback(Clock())
    trainer.train()
    return {
        "seconds": statistics.median(steps[1:]),
        "rollout_seconds": statistics.median(rollouts[1:]),
    }


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def decode_profile(world: World) -> dict[str, Any]:
    """Where decoding's time goes: the device's kernels, and what the host adds between them."""
    from torch.profiler import ProfilerActivity, profile

    world.require_device()
    work = TINY_WORK if world.dry_run else Work(8, 8, 32)
    policy = model_policy(world, "llama-3.2-1b", work)
    engine = NativeEngine(policy, NativeSettings(reuse_mib=0))
    engine.sync(policy.prompt)
    sampling = SamplingSettings(max_tokens=work.tokens, min_tokens=work.tokens)

    def decode() -> None:
        engine.generate(queries(work.queries), work.group, sampling, 0)

    decode()
    plain = world.seconds(decode)
    activities = [ProfilerActivity.CPU]
    if not world.dry_run:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        decode()
        world.synchronize()
    rows = _spent(seen, world)
    busy = sum(row["microseconds"] for row in rows) / 1e6
    figures = {
        "seconds": plain,
        "tokens_per_second": work.completion_tokens / plain,
        "milliseconds_per_token_step": 1e3 * plain / work.tokens,
        "device_busy_seconds": busy,
        "share_of_time_device_is_busy": busy / plain,
        "launches_per_token_step": sum(row["calls"] for row in rows) / work.tokens,
        "top": rows[:25],
    }
    _draw_bars(
        world,
        "decode_profile.png",
        {row["name"][:50]: row["microseconds"] / 1e3 for row in rows[:12]},
        f"decoding, ms ({figures['share_of_time_device_is_busy']:.0%} of the time busy)",
    )
    return figures


def _spent(seen: Any, world: World) -> list[dict[str, Any]]:
    """The device's kernels and copies by time, longest first; on a CPU the operators.

    An operator's row repeats the time of the kernels that it started, so on a GPU only rows of the
    device itself count.
    """
    rows: list[dict[str, Any]] = []
    for event in seen.key_averages():
        if not world.dry_run and str(event.device_type) != "DeviceType.CUDA":
            continue
        spent: Any = event.self_cpu_time_total if world.dry_run else event.self_device_time_total
        rows.append({"name": event.key[:90], "calls": event.count, "microseconds": spent})
    return sorted(rows, key=lambda row: -row["microseconds"])


@contextmanager
def _figure(world: World, name: str) -> Iterator[Any]:
    """Axes that are saved under a name; None where matplotlib is missing."""
    if not _is_there("matplotlib"):
        yield None
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    yield axes
    figure.tight_layout()
    figure.savefig(world.output / name, dpi=110)
    pyplot.close(figure)


def _draw_bars(world: World, name: str, bars: dict[str, float], title: str) -> None:
    with _figure(world, name) as axes:
        if axes is None:
            return
        axes.barh(list(bars)[::-1], list(bars.values())[::-1])
        axes.set_title(title + (" - DRY RUN on a CPU" if world.dry_run else ""), fontsize=9)
        axes.tick_params(labelsize=7)


def _draw_step(world: World, name: str, figures: dict[str, Any]) -> None:
    bars = {
        f"{side}: {key}": figures[side][f"{key}_seconds" if key != "step" else "seconds"]
        for side in ("rlprompt", "trl", "hf_generate")
        for key in ("step", "rollout")
        if ("seconds" if key == "step" else "rollout_seconds") in figures[side]
    }
    _draw_bars(world, f"step_{name}.png", bars, f"seconds, shape of {name}")
