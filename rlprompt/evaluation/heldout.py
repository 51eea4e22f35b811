"""Held-out evaluation: base, hand-written text and learned prompt under the same sampling.

Letters: B completions, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rlprompt.engines.base import Engine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt
from rlprompt.rewards.runner import RewardRunner
from rlprompt.rollout import RolloutBatch, collect
from rlprompt.settings import Settings
from rlprompt.training.packing import pack
from rlprompt.types import Query


class EvaluationSettings(Settings):
    """Held-out evaluation during training."""

    every: int = Field(default=10, ge=1)
    """Steps between evaluations of the learned prompt; the last step is always evaluated."""
    completions_per_query: int = Field(default=2, ge=1)
    """Completions per held-out query."""
    handwritten: str | None = None
    """A hand-written system prompt to compare with; null = none."""
    max_queries: int | None = Field(default=None, ge=1)
    """Evaluate on the first this many held-out queries; null = all."""

    @field_validator("handwritten")
    @classmethod
    def _not_blank(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("handwritten is blank; write a system prompt, or null for none")
        return value


@dataclass(frozen=True)
class HeldoutResult:
    """How one prompt did."""

    batch: RolloutBatch
    metrics: dict[str, object]
    """A row of `evaluation.jsonl`."""

    @property
    def reward(self) -> float:
        """Mean total reward."""
        return float(self.metrics["reward"])  # type: ignore[arg-type]


class HeldoutEvaluator:
    """Scores prompts on one set of queries, with one seed: all prompts meet the same draws."""

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        rewards: RewardRunner,
        queries: Sequence[Query],
        sampling: SamplingSettings,
        *,
        completions_per_query: int,
        seed: int,
        token_budget: int = 1024,
    ) -> None:
        """Join the parts; the engine's prompt is changed by `evaluate`."""
        self._policy = policy
        self._engine = engine
        self._rewards = rewards
        self._queries = list(queries)
        self._sampling = sampling
        self._copies = completions_per_query
        self._seed = seed
        self._budget = token_budget

    def evaluate(
        self, prompt: Prompt, step: int, progress: Callable[[int, int], None] | None = None
    ) -> HeldoutResult:
        """Complete every query under a prompt and score it.

        Beside the rewards, `base_logprob` is the mean log-probability per token of the completions
        under the base without a prompt: it falls when a prompt buys reward with text that the
        model itself finds strange.
        """
        self._engine.sync(prompt)
        batch = collect(
            self._engine,
            self._queries,
            self._copies,
            self._sampling,
            self._rewards,
            step=step,
            seed=self._seed,
            progress=progress,
        )
        total = batch.rewards.total
        known = total[~total.isnan()]
        spread = float(known.std()) if known.numel() > 1 else 0.0
        metrics: dict[str, object] = {
            "reward": float(known.mean()) if known.numel() else math.nan,
            "reward_std": spread,
            "reward_sem": spread / math.sqrt(max(1, known.numel())),
            "rewards": {k: _mean(v) for k, v in batch.rewards.values.items()},
            "num_completions": len(batch.completions),
            "mean_length": float(batch.lengths.float().mean()),
            "terminated_share": float(batch.terminated.float().mean()),
            "base_logprob": self.base_logprob(batch),
        }
        return HeldoutResult(batch, metrics)

    @torch.no_grad()
    def base_logprob(self, batch: RolloutBatch) -> float:
        """Mean log-probability per completion token under the base, in nats."""
        base = NonePrompt()
        prefix = self._policy.prefix(base)
        queries = [len(self._policy.query_ids(group.query, base)) for group in batch.groups]
        lengths = [[len(c.token_ids) for c in group.completions] for group in batch.groups]
        total, count = 0.0, 0
        for micro in pack(queries, lengths, self._budget):
            tree = self._policy.tree(
                [batch.groups[g].query for g, _ in micro.rows],
                [[batch.groups[g].completions[i] for i in places] for g, places in micro.rows],
                prefix,
                base,
            )
            scores = self._policy.logprobs(tree, prefix)
            total += float(scores.logprobs.sum())
            count += int(scores.mask.sum())
        return total / count


def _mean(values: Tensor) -> float | None:
    known = values[~values.isnan()]
    return float(known.mean()) if known.numel() else None
