"""rlprompt's side of the benchmark: one GRPO step, as a worker.

python -m benchmarks.peers.rlprompt_grpo --model DIR --queries FILE --reward FILE.py:NAME
    a worker (see `worker.py`): one line `{"cmd": "step"}` = one GRPO step

python -m benchmarks.peers.rlprompt_grpo ... --steps 20 --heldout FILE --eval-every 2 --json OUT
    trains and writes the held-out reward by step
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.worker import (
    LORA_RANK,
    METHODS,
    GrpoWork,
    claim_stdout,
    cpu_seconds,
    emit,
    load_queries,
    memory,
    parse_settings,
    serve,
    setting,
    versions,
)
from rlprompt.algorithms.grpo import GRPO, GRPOSettings
from rlprompt.data import QuerySampler
from rlprompt.engines.native import NativeEngine, NativeSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.evaluation.heldout import HeldoutEvaluator
from rlprompt.evaluation.measures import BaseLogprob
from rlprompt.model.base import ModelSettings
from rlprompt.policy import Policy, open_policy
from rlprompt.prompts.adapter import AdapterPrompt, AdapterSettings
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.layer_adapters import LoRASettings
from rlprompt.prompts.prefix import PrefixPrompt, PrefixSettings
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.prompts.text import NonePrompt
from rlprompt.rewards import RewardSettings, build_rewards
from rlprompt.rollout.collect import collect
from rlprompt.training.optimizer import build_optimizer
from rlprompt.training.settings import OptimizerSettings
from rlprompt.training.update import PhaseClock, Updater
from rlprompt.types import Query

PACKAGES = ("rlprompt", "torch", "transformers")


@dataclass(frozen=True)
class StepSettings(GrpoWork):
    """The shared work, and what only our side has."""

    cosine_steps: int = setting(0, "Length of a cosine schedule; 0 = constant.")
    max_norm_ratio: float = setting(1.5, "Trust region of the soft tokens; 0 switches it off.")
    num_epochs: int = setting(1, "Updates per rollout batch.")
    token_budget: int = setting(1024, "Packed tokens per micro-batch.")
    reuse_mib: int = setting(128, "Memory for products that rollout and update share.")
    eval_late_every: int = setting(0, "Another --eval-every, after step --eval-late-from; 0 = no.")
    eval_late_from: int = setting(0, "See --eval-late-every.")

    def evaluates(self, step: int) -> bool:
        """Whether the held-out reward is measured after this step."""
        late = self.eval_late_every and step > self.eval_late_from
        return step % (self.eval_late_every if late else self.eval_every) == 0 or step == self.steps


def fresh_prompt(settings: StepSettings, policy: Policy) -> Prompt:
    """What is trained, as `--method` says.

    Raises:
        ValueError: the method is none of METHODS.
    """
    if settings.method not in METHODS:
        raise ValueError(f"--method {settings.method} is none of {', '.join(METHODS)}.")
    if settings.method == "prefix":
        prefix = PrefixSettings(
            num_virtual_tokens=settings.num_virtual_tokens, init_text=settings.init_text
        )
        return PrefixPrompt.create(prefix, policy, settings.seed)
    if settings.method == "lora":
        lora = AdapterSettings(text=settings.init_text, method=LoRASettings(rank=LORA_RANK))
        return AdapterPrompt.create(lora, policy, settings.seed)
    soft = SoftSettings(
        num_virtual_tokens=settings.num_virtual_tokens,
        init_text=settings.init_text,
        max_norm_ratio=settings.max_norm_ratio or None,
    )
    return SoftPrompt.create(soft, policy, settings.seed)


class Stepper:
    """One training step at a time, built from the parts that `rlprompt train` uses."""

    def __init__(self, settings: StepSettings) -> None:
        """Load the base and join the parts."""
        self.settings = settings
        threads = settings.threads or None
        self.policy = open_policy(ModelSettings(path=settings.model, threads=threads))
        self.policy.prompt = fresh_prompt(settings, self.policy)
        self.engine = NativeEngine(self.policy, NativeSettings(reuse_mib=settings.reuse_mib))
        self.sampling = SamplingSettings(
            temperature=settings.temperature,
            max_tokens=settings.max_new_tokens,
            min_tokens=settings.min_new_tokens,
        )
        reward = RewardSettings(path=str(Path(settings.reward).absolute()), name="reward")
        self.rewards = build_rewards([reward], Path.cwd())
        grpo = GRPOSettings.model_validate(
            {
                "group_size": settings.group_size,
                "kl_coef": settings.beta,
                "num_epochs": settings.num_epochs,
                "scale_rewards": settings.scale_rewards,
            }
        )
        self.optimizer = build_optimizer(
            self.policy.parameters(),
            OptimizerSettings(lr=settings.lr, betas=(0.9, settings.adam_beta2)),
            settings.lr,
        )
        self.queries = as_queries(load_queries(settings.queries))
        self.sampler = QuerySampler(len(self.queries), settings.num_queries, settings.seed)
        self.updater = Updater(
            self.policy,
            GRPO(grpo, settings.max_new_tokens),
            NonePrompt() if settings.beta else None,
            temperature=settings.temperature,
            token_budget=settings.token_budget,
        )
        self.step_number = 0

    def step(self) -> dict[str, Any]:
        """One rollout batch and its update."""
        settings = self.settings
        wall, cpu = time.perf_counter(), cpu_seconds()
        clock = PhaseClock()
        self.engine.sync(self.policy.prompt)
        sync = time.perf_counter() - wall
        batch = collect(
            lambda: self.engine.generate(
                [self.queries[i] for i in self.sampler.next()],
                settings.group_size,
                self.sampling,
                settings.seed * 100_003 + self.step_number,
                keep_products=True,
            ),
            self.rewards,
            step=self.step_number,
        )
        _, metrics = self.updater.learn(
            batch, self.optimizer, self._set_lr, settings.max_grad_norm or None, clock
        )
        self.step_number += 1
        seconds = time.perf_counter() - wall
        phases = {"rollout": batch.rollout_seconds + sync, "reward": batch.reward_seconds}
        phases |= dict(clock.seconds)
        queries = [self.policy.query_ids(group.query) for group in batch.groups]
        completion = int(batch.lengths.sum())
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds() - cpu,
            "phases": {**phases, "other": seconds - sum(phases.values())},
            "tokens": {
                "rows": len(batch.completions),
                "query": sum(map(len, queries)) * settings.group_size,
                "prefix": self.policy.prefix_length(),
                "completion": completion,
                "forward_positions": sum(map(len, queries)) + completion - len(batch.completions),
            },
            "reward": float(batch.rewards.total.nanmean()),
            "sampling_logp_difference": metrics["sampling/sampling_logp_difference/mean"],
        }

    def evaluator(self) -> HeldoutEvaluator:
        """Held-out evaluation with the sampling of training."""
        settings = self.settings
        return HeldoutEvaluator(
            self.engine,
            self.rewards,
            as_queries(load_queries(settings.heldout)),
            self.sampling,
            completions_per_query=settings.heldout_samples,
            seed=settings.eval_seed,
            measures={"base_logprob": BaseLogprob(self.policy, settings.token_budget)},
        )

    def describe(self) -> dict[str, Any]:
        """Settings and versions."""
        threads = {"threads_used": torch.get_num_threads(), "dtype": str(self.policy.base.dtype)}
        return {"settings": {**asdict(self.settings), **threads}, "versions": versions(*PACKAGES)}

    def _set_lr(self) -> float:
        lr, total = self.settings.lr, self.settings.cosine_steps
        if total:
            lr *= 0.1 + 0.45 * (1.0 + math.cos(math.pi * min(1.0, self.step_number / total)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr


def as_queries(rows: list[dict[str, Any]]) -> list[Query]:
    """Rows with a `query` text as conversations of one turn."""
    return [
        Query(
            ({"role": "user", "content": row["query"]},),
            {key: value for key, value in row.items() if key != "query"},
            index,
        )
        for index, row in enumerate(rows)
    ]


def train_and_evaluate(settings: StepSettings) -> dict[str, Any]:
    """Train `settings.steps` steps; return settings, one report per step and held-out reward."""
    stepper = Stepper(settings)
    evaluator = stepper.evaluator()
    reports: list[dict[str, Any]] = []
    curve = []
    for number in range(settings.steps + 1):
        if number:
            reports.append(stepper.step())
        if settings.evaluates(number):
            result = evaluator.evaluate(stepper.policy.prompt, number)
            curve.append({"step": number, **result.metrics})
            sys.stderr.write(f"step {number}: held-out reward {result.reward:.3f}\n")
    return {**stepper.describe(), "steps": reports, "heldout": curve}


def main(argv: list[str] | None = None) -> None:
    """Read the flags and run as worker or as a short training."""
    settings = parse_settings(StepSettings, __doc__ or "", argv)
    out = claim_stdout()
    if not settings.steps:
        stepper = Stepper(settings)
        serve(stepper.step, stepper.describe(), out)
        return
    result = train_and_evaluate(settings)
    if settings.json:
        Path(settings.json).write_text(json.dumps(result) + "\n", encoding="utf-8")
    else:
        emit(out, "result", {**result, **memory()})


if __name__ == "__main__":
    main()
