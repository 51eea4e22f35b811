"""Where the completions of a step come from: drawn under a prompt, or given by the dataset.

A source owns the position in the data. All of them give the same thing, a `RolloutBatch`, so that
the loop and the updates do not know which one it was.

Letters: B completions, G groups.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch

from rlprompt.algorithms.base import Algorithm
from rlprompt.data.sampler import QuerySampler
from rlprompt.engines.base import Engine, Generation
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.surroundings import asked_under
from rlprompt.rewards.base import RewardBatch
from rlprompt.rewards.runner import RewardRunner
from rlprompt.rollout.collect import RolloutBatch, collect
from rlprompt.types import Completion, Group, Query, Stateful

logger = logging.getLogger(__name__)

Augment = Callable[[Query, int], Query]
"""(query, seed) -> the query as it is asked this time."""


class Source(Protocol):
    """Gives one batch per step."""

    @property
    def temperature(self) -> float:
        """What log-probabilities of its completions are tempered with."""
        ...

    @property
    def epoch(self) -> float:
        """Passes over the training queries."""
        ...

    def collect(self, step: int, seed: int) -> RolloutBatch:
        """The batch of a step.

        Args:
            step: the number of finished steps.
            seed: the seed of everything that is drawn for it, but for the choice of queries.
        """
        ...

    def prefetch(self, step: int, seed: int) -> AbstractContextManager[dict[str, float]]:
        """A block in which the batch of the next step may be drawn.

        Arguments are those that `collect` will be given then. What the block gives holds metrics,
        in seconds, once it has ended.
        """
        ...

    @property
    def others(self) -> Mapping[str, Stateful]:
        """What else a checkpoint needs to go on, by name."""
        ...

    def close(self) -> None:
        """End what runs beside the run; the source stays usable."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, as plain JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            InputError: it was taken with other data or settings.
        """
        ...


class QuerySource:
    """The training queries and the position in them: which are next."""

    def __init__(
        self, queries: Sequence[Query], sampler: QuerySampler, augment: Augment | None = None
    ) -> None:
        """Join the parts.

        Args:
            queries: queries to draw from.
            sampler: the order of their numbers.
            augment: function that changes a query before it is asked.
        """
        self._queries = queries
        self._sampler = sampler
        self._augment = augment

    @property
    def epoch(self) -> float:
        """Passes over the training queries."""
        return self._sampler.epoch

    def prefetch(self, step: int, seed: int) -> AbstractContextManager[dict[str, float]]:
        """Nothing is drawn ahead."""
        del step, seed
        return nullcontext({})

    @property
    def others(self) -> Mapping[str, Stateful]:
        """Nothing."""
        return {}

    def close(self) -> None:
        """Nothing runs."""

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the sampler its state back."""
        self._sampler.load_state_dict(state)

    def next(self, seed: int) -> list[Query]:
        """The queries of the next batch, as they are asked; the position moves on.

        Args:
            seed: seed of what is drawn for augmentation.
        """
        return self.as_asked([self._queries[i] for i in self._sampler.next()], seed)

    def as_asked(self, queries: Sequence[Query], seed: int) -> list[Query]:
        """Chosen training queries as they are asked; the position stays where it is.

        Args:
            queries: training queries, in order.
            seed: seed of what is drawn for augmentation.
        """
        if self._augment is None:
            return list(queries)
        return [self._augment(query, seed + place) for place, query in enumerate(queries)]


class RolloutSource(QuerySource):
    """Completions drawn by an engine under a prompt, scored by the rewards.

    Groups that the algorithm finds not worth learning from are replaced by new ones, up to its
    `max_draws` (dynamic sampling; DAPO, arXiv 2503.14476, section 3.2). What is still missing then
    is filled up with the groups left out.
    """

    def __init__(
        self,
        queries: Sequence[Query],
        sampler: QuerySampler,
        engine: Engine,
        prompt: Prompt,
        rewards: RewardRunner,
        algorithm: Algorithm,
        sampling: SamplingSettings,
        augment: Augment | None = None,
        is_trained: bool = True,
    ) -> None:
        """Join the parts.

        Args:
            queries: the queries to draw from.
            sampler: the sampler over their numbers.
            engine: the engine that draws completions.
            prompt: the prompt to draw under; the one that is trained, or a teacher.
            rewards: the rewards that score what was drawn.
            algorithm: the algorithm, which says how many completions a query gets and which groups
                count.
            sampling: how tokens are drawn.
            augment: what changes a query before it is asked; None = nothing.
            is_trained: whether `prompt` is the one that is trained, which alone stands in frames.
        """
        super().__init__(queries, sampler, augment)
        self._is_trained = is_trained
        self._engine = engine
        self._prompt = prompt
        self._rewards = rewards
        self._algorithm = algorithm
        self._sampling = sampling
        self.progress: Callable[[int, int], None] | None = None
        """Called with every token of a rollout; see `Engine.generate`. May raise to end it."""

    @property
    def temperature(self) -> float:
        """The sampling temperature."""
        return self._sampling.temperature

    def collect(self, step: int, seed: int, *, keep_products: bool = True) -> RolloutBatch:
        """Draw and score; see `Source.collect`.

        Args:
            step: the number of finished steps.
            seed: the seed of everything that is drawn, but for the choice of queries.
            keep_products: whether the batch is learned from under the prompt that it is drawn
                under; see `Engine.generate`.
        """
        batch = self._draw(step, seed, keep_products)
        size = len(batch.groups)
        wanted, spare = self._split(batch)
        draws = 1
        while len(wanted) < size and draws < self._algorithm.max_draws:
            more = self._draw(step, seed + draws * 7_368_787, keep_products)
            batch = _joined(batch, more)
            wanted, spare = self._split(batch)
            draws += 1
        chosen = sorted([*wanted, *spare][:size])
        if draws == 1:
            return batch
        kept = _only(batch, chosen)
        metrics = {
            **kept.rewards.metrics,
            "dynamic_sampling/draws": float(draws),
            "dynamic_sampling/kept_share": len(wanted) / len(batch.groups),
        }
        return replace(kept, rewards=replace(kept.rewards, metrics=metrics))

    def _draw(self, step: int, seed: int, keep_products: bool) -> RolloutBatch:
        return collect(lambda: self._generation(seed, keep_products), self._rewards, step=step)

    def _generation(self, seed: int, keep_products: bool) -> Generation:
        """Completions of the next queries, each under the prompt as it is asked under it."""
        queries, size = self.next(seed), self._algorithm.group_size
        known = {
            query.around: asked_under(self._prompt, query.around, is_trained=self._is_trained)
            for query in queries
        }
        if all(prompt is self._prompt for prompt in known.values()):
            self._engine.sync(self._prompt)
            return self._engine.generate(
                queries, size, self._sampling, seed, self.progress, keep_products=keep_products
            )
        under = [known[query.around] for query in queries]
        return self._engine.generate_under(
            under, queries, size, self._sampling, seed, self.progress
        )

    def _split(self, batch: RolloutBatch) -> tuple[list[int], list[int]]:
        """Groups worth learning from, and the others."""
        rewards = batch.rewards.total.view(len(batch.groups), -1)
        kept = [self._algorithm.keeps(row) for row in rewards]
        numbers = range(len(kept))
        return [g for g in numbers if kept[g]], [g for g in numbers if not kept[g]]


class ColumnSource(QuerySource):
    """Completions that the dataset gives: one per column, in the columns' order."""

    def __init__(
        self,
        queries: Sequence[Query],
        sampler: QuerySampler,
        policy: Policy,
        columns: Sequence[str],
        augment: Augment | None = None,
    ) -> None:
        """Check and tokenise every answer.

        Args:
            queries: the queries, whose columns hold the answers.
            sampler: the sampler over their numbers.
            policy: the policy, which turns text into tokens.
            columns: the names of the columns: `["completion"]`, or `["chosen", "rejected"]`.
            augment: what changes a query before it is asked; None = nothing.

        Raises:
            InputError: a column is missing, or an answer is not a non-empty text.
        """
        super().__init__(queries, sampler, augment)
        self._answers = {
            id(query): tuple(given_completion(policy, query, column) for column in columns)
            for query in queries
        }

    @property
    def temperature(self) -> float:
        """1: given text was drawn at no temperature."""
        return 1.0

    def collect(self, step: int, seed: int) -> RolloutBatch:
        """The next queries with their answers; see `Source.collect`."""
        start = time.perf_counter()
        numbers = self._sampler.next()
        groups = []
        queries = [self._queries[number] for number in numbers]
        for query, asked in zip(queries, self.as_asked(queries, seed), strict=True):
            groups.append(Group(asked, self._answers[id(query)]))
        count = sum(len(group.completions) for group in groups)
        return RolloutBatch(tuple(groups), unscored(count), time.perf_counter() - start, 0.0)


def given_completion(policy: Policy, query: Query, column: str) -> Completion:
    """A dataset's answer as a completion that no engine drew.

    Raises:
        InputError: see `given_text`.
    """
    text = given_text(query, column)
    return Completion(tuple(policy.slot.completion_ids(text)), (), text.strip(), True)


def given_text(query: Query, column: str) -> str:
    """A dataset's answer to a query.

    Raises:
        InputError: the column is missing, or its value is not a non-empty text or a list with one
            assistant message.
    """
    where = query.place or f"row {query.index} of the dataset"
    if column not in query.columns:
        known = ", ".join(sorted(query.columns)) or "none"
        raise InputError(
            f"{where} has no column '{column}' (columns: {known}); name the column that holds the "
            "answers in the algorithm's settings"
        )
    value = query.columns[column]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content")
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{where}, column '{column}', holds no answer; write a non-empty text, or a list with "
            "one assistant message"
        )
    return value


def unscored(count: int) -> RewardBatch:
    """The scores of B completions that no reward has seen."""
    return RewardBatch(torch.full((count,), torch.nan), {}, {}, {}, {}, {}, [])


def _joined(first: RolloutBatch, second: RolloutBatch) -> RolloutBatch:
    """Two batches as one; metrics are means weighted by their number of groups.

    An engine has given up the products of the first to keep those of the second.
    """
    sizes = len(first.groups), len(second.groups)
    a, b = first.rewards, second.rewards
    metrics = {
        name: (a.metrics.get(name, value) * sizes[0] + b.metrics.get(name, value) * sizes[1])
        / sum(sizes)
        for name, value in {**b.metrics, **a.metrics}.items()
    }
    missing = [None] * len(a.total), [None] * len(b.total)
    extras = {
        name: [*a.extras.get(name, missing[0]), *b.extras.get(name, missing[1])]
        for name in {**a.extras, **b.extras}
    }
    rewards = RewardBatch(
        total=torch.cat([a.total, b.total]),
        values={name: torch.cat([a.values[name], b.values[name]]) for name in a.values},
        weights=a.weights,
        roles=a.roles,
        extras=extras,
        metrics=metrics,
        errors=[*a.errors, *b.errors],
        costs={name: torch.cat([a.costs[name], b.costs[name]]) for name in a.costs},
        group_index=(*a.group_index, *(sizes[0] + g for g in b.group_index)),
        logged=tuple(dict.fromkeys([*a.logged, *b.logged])),
    )
    return RolloutBatch(
        (*first.groups, *second.groups),
        rewards,
        first.rollout_seconds + second.rollout_seconds,
        first.reward_seconds + second.reward_seconds,
        products=second.products,
    )


def _only(batch: RolloutBatch, groups: Sequence[int]) -> RolloutBatch:
    """Some groups of a batch; they all have the same size."""
    size = len(batch.groups[0].completions)
    rows = [g * size + i for g in groups for i in range(size)]
    old = batch.rewards
    rewards = replace(
        old,
        total=old.total[rows],
        values={name: values[rows] for name, values in old.values.items()},
        extras={name: [values[i] for i in rows] for name, values in old.extras.items()},
        costs={name: values[rows] for name, values in old.costs.items()},
        group_index=tuple(g for g in range(len(groups)) for _ in range(size)),
    )
    return replace(batch, groups=tuple(batch.groups[g] for g in groups), rewards=rewards)
