"""Held-out evaluation: base, hand-written text and learned prompt under the same sampling.

Letters: Q queries, n completions per query, B = Q * n completions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from rlprompt.certify.comparison import Scores, standard_error
from rlprompt.certify.succession import Against
from rlprompt.engines.base import Engine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.evaluation.measures import Measure
from rlprompt.evaluation.values import value_of
from rlprompt.prompts.base import Prompt
from rlprompt.rewards.runner import RewardRunner
from rlprompt.rollout.collect import RolloutBatch, collect
from rlprompt.settings import Settings
from rlprompt.types import Query


class AcceptedSettings(Settings):
    """When a later prompt is shown to be better; see `rlprompt.certify.succession`."""

    against: Against = "start"
    """Better than what: than the prompt that the run began with (`start`; of several that are, the
    one with the highest mean is kept), or than the one that is kept at the moment (`kept`)."""
    alpha: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Probability that the run, or the whole population, ever keeps a prompt that is not better."""
    spread: float | None = Field(default=None, gt=0.0)
    """Largest difference of two values of one query, such as 1 for rewards in [0, 1]; the mean is
    then compared. Null = the number of queries on which a prompt is better."""


class EvaluationSettings(Settings):
    """Held-out evaluation during training."""

    every: int = Field(default=10, ge=1)
    """Steps between evaluations of the learned prompt; the last step is always evaluated."""
    completions_per_query: int = Field(default=2, ge=1, le=4096)
    """Completions per held-out query."""
    handwritten: str | None = None
    """A hand-written system prompt to compare with; null = none."""
    texts: list[str] = Field(default_factory=list)
    """Other hand-written system prompts. The best of them on the validation queries is compared
    with the learned prompt beside `handwritten`."""
    max_queries: int | None = Field(default=None, ge=1)
    """Evaluate on the first this many queries of a split; null = all."""

    query_information: bool = False
    """Also measure how much an answer tells about its query, under the base, in nats per token: a
    sign of relevance that no built-in reward looks at. One more pass over the answers."""
    select_by: str = "reward"
    """What makes a prompt the best one, which the artifact holds: `reward` (the total), or the name
    of a reward, such as a gold one with the role `metric` that the trained reward cannot buy."""
    keep: Literal["highest", "accepted"] = "highest"
    """Which prompt is kept: the one with the highest mean (`highest`), or only one that is shown to
    be better on the paired values of the validation queries (`accepted`), which in doubt is the
    prompt that the run began with."""
    evidence: AcceptedSettings | None = None
    """With `accepted`: when a prompt counts as better; null = the defaults."""

    @model_validator(mode="after")
    def _evidence_has_effect(self) -> Self:
        if self.evidence is not None and self.keep != "accepted":
            raise ValueError(
                f"evidence has no effect with keep: {self.keep}; remove it, or set keep: accepted"
            )
        return self

    @property
    def acceptance(self) -> AcceptedSettings | None:
        """What a later prompt must show to be kept; None = a higher mean."""
        return None if self.keep == "highest" else self.evidence or AcceptedSettings()

    @field_validator("handwritten")
    @classmethod
    def _not_blank(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("handwritten is blank; write a system prompt, or null for none")
        return value

    @field_validator("texts")
    @classmethod
    def _texts_differ(cls, value: list[str]) -> list[str]:
        for place, text in enumerate(value):
            if not text.strip():
                raise ValueError(f"texts[{place}] is blank; write a system prompt, or remove it")
            if text in value[:place]:
                raise ValueError(f"texts[{place}] is there twice; remove one")
        return value


@dataclass(frozen=True)
class Criterion:
    """What the best prompt is chosen by where no reward has a score: a measure."""

    measure: str
    """Its name."""
    sign: float = 1.0
    """-1 when less is better."""


@dataclass(frozen=True)
class HeldoutResult:
    """How one prompt did."""

    batch: RolloutBatch
    metrics: dict[str, object]
    """A row of `evaluation.jsonl`."""
    scores: Mapping[str, Scores]
    """[Q, n] values by name, NaN = unknown: `reward` (the total, or the criterion's [Q, 1] means
    over a query's tokens) and each reward."""

    @property
    def reward(self) -> float:
        """Mean total reward, or the criterion that stands for it."""
        return float(self.metrics["reward"])  # type: ignore[arg-type]

    def value(self, name: str) -> float:
        """`reward`, or the mean of the reward of that name; NaN when it could not be scored."""
        value = value_of(self.metrics, name)
        return math.nan if value is None else float(value)

    @property
    def flat(self) -> dict[str, Any]:
        """The metrics, those of rewards as `rewards/{name}/mean`."""
        rewards: Any = self.metrics["rewards"]
        return {**self.metrics, **{f"rewards/{k}/mean": v for k, v in rewards.items()}}


class HeldoutEvaluator:
    """Scores prompts on one set of queries, with one seed: all prompts meet the same draws."""

    def __init__(
        self,
        engine: Engine,
        rewards: RewardRunner,
        queries: Sequence[Query],
        sampling: SamplingSettings,
        *,
        completions_per_query: int,
        seed: int,
        measures: Mapping[str, Measure],
        criterion: Criterion | None = None,
    ) -> None:
        """Join the parts; the engine's prompt is changed by `evaluate`.

        Args:
            engine: engine that draws the completions.
            rewards: runner that scores them.
            queries: queries held out from training.
            sampling: settings of the draws, as in training.
            completions_per_query: number of completions to draw.
            seed: seed of the draws.
            measures: other numbers to log, by name.
            criterion: measure that stands for the reward where no reward has a score.
        """
        self._engine = engine
        self._rewards = rewards
        self._queries = list(queries)
        self._sampling = sampling
        self._copies = completions_per_query
        self._seed = seed
        self._measures = dict(measures)
        self._criterion = criterion
        self._fixed: dict[tuple[str, str], HeldoutResult] = {}

    def evaluate(
        self, prompt: Prompt, step: int, progress: Callable[[int, int], None] | None = None
    ) -> HeldoutResult:
        """Complete every query under a prompt and score it.

        Before the first step a prompt that has nothing to train is evaluated once, so that the
        members of a population share base and hand-written text. What a search has found later is
        evaluated anew: a reward may draw at random or see the step, and a resumed run must meet
        what the uninterrupted one met.
        """
        key = (prompt.kind, prompt.init_text)
        if prompt.parameters() or step > 0:
            return self._evaluate(prompt, step, progress)
        if key not in self._fixed:
            self._fixed[key] = self._evaluate(prompt, step, progress)
        return self._fixed[key]

    def close(self) -> None:
        """End threads and processes of the rewards; the evaluator stays usable."""
        self._rewards.close()

    def _evaluate(
        self, prompt: Prompt, step: int, progress: Callable[[int, int], None] | None
    ) -> HeldoutResult:
        self._engine.sync(prompt)
        batch = collect(
            lambda: self._engine.generate(
                self._queries, self._copies, self._sampling, self._seed, progress
            ),
            self._rewards,
            step=step,
        )
        named = {"reward": batch.rewards.total, **batch.rewards.values}
        scores = {name: self._table(values) for name, values in named.items()}
        measured = {name: measure(prompt, batch.groups) for name, measure in self._measures.items()}
        total = batch.rewards.total
        known = total[~total.isnan()]
        metrics: dict[str, object] = {
            "reward": float(known.mean()) if known.numel() else math.nan,
            "reward_std": float(known.std()) if known.numel() > 1 else 0.0,
            "rewards": {k: _mean(v) for k, v in batch.rewards.values.items()},
            "num_queries": len(self._queries),
            "num_completions": len(batch.completions),
            "mean_length": float(batch.lengths.float().mean()),
            "terminated_share": float(batch.terminated.float().mean()),
            **{name: each.mean for name, each in measured.items()},
        }
        if self._criterion is not None:
            found, sign = measured[self._criterion.measure], self._criterion.sign
            metrics["reward"] = sign * found.mean
            scores["reward"] = sign * np.asarray(found.by_query)[:, None]
        error = standard_error(scores["reward"])
        metrics["reward_sem"] = None if math.isnan(error) else error
        return HeldoutResult(batch, metrics, scores)

    def _table(self, values: Tensor) -> Scores:
        """[Q * n] -> [Q, n]."""
        return values.double().reshape(len(self._queries), -1).numpy()


def _mean(values: Tensor) -> float | None:
    known = values[~values.isnan()]
    return float(known.mean()) if known.numel() else None
