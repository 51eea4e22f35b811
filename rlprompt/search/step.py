"""One step of a search on one page: candidates, completions, scores, and what is logged.

    searcher.ask              candidates
      -> engine.generate      completions of each on the same queries, drawn with the same seed
      -> rewards.score        all of them in one call, each candidate's query a group of its own
      -> searcher.tell        one trial per candidate

With `max_calls` the last step meets fewer queries than the others, as many as are paid for, and
every candidate meets them all. A step that cannot give each candidate one query is not made, and
the search is over.

Nothing here asks which searcher it is. A run (`rlprompt.runs`) sees this through the protocol
`Learner` and knows no candidate.

Letters: C candidates, Q queries, n completions per query, B = C * Q * n completions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlprompt.artifacts.memory import PackedPrompt
from rlprompt.engines.base import Engine, Generation
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.prompts.base import Prompt
from rlprompt.rewards.runner import RewardRunner
from rlprompt.rollout.collect import (
    RolloutBatch,
    collect,
    completion_metrics,
    completion_rows,
    logged_metrics,
)
from rlprompt.rollout.sources import QuerySource
from rlprompt.runs.learner import LearnerState, StepResult, named_under
from rlprompt.runs.signal import missing_signal
from rlprompt.search.base import Candidate, Searcher, Trial
from rlprompt.search.lineage import Lineage
from rlprompt.types import Query

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchParts:
    """What a step of a search is made of."""

    searcher: Searcher
    """Says what is tried."""
    engine: Engine
    """Draws completions under a candidate's prompt."""
    rewards: RewardRunner
    """Scores them."""
    queries: QuerySource
    """The training queries and the position in them."""
    sampling: SamplingSettings
    """How tokens are drawn."""
    completions_per_query: int
    """n."""
    base: str
    """Id of the base, for prompts whose saved form names it."""
    max_calls: int | None = None
    """The most completions that are drawn in all; None = no limit."""


class SearchStep:
    """Learns a prompt by trial; implements `rlprompt.runs.learner.Learner`."""

    def __init__(self, parts: SearchParts) -> None:
        """Join the parts; nothing is tried yet.

        Raises:
            InputError: the engine cannot apply the prompt that the search starts from, or
                `max_calls` does not suffice for one query.
        """
        self.parts = parts
        self._lineage = Lineage()
        self._start = type(self.prompt)
        self._exhausted: int | None = None
        """The `max_calls` that left too little for what the searcher asked for last."""
        self._require_calls(parts.searcher.num_next)
        if not parts.engine.supports(self.prompt):
            raise InputError(
                f"the engine cannot apply a {self.prompt.kind} prompt, which the search starts "
                "from; choose another engine, or another prompt.type"
            )

    @property
    def prompt(self) -> Prompt:
        """The incumbent's prompt."""
        return self.parts.searcher.incumbent.prompt

    @property
    def is_over(self) -> bool:
        """Whether the searcher has nothing more to ask for, or no completion to ask for it with."""
        searcher = self.parts.searcher
        return searcher.is_over or self._is_spent

    @property
    def _is_spent(self) -> bool:
        limit = self.parts.max_calls
        if limit is None:
            return False
        return limit == self._exhausted or self._num_queries(self.parts.searcher.num_next) == 0

    def _num_queries(self, candidates: int) -> int | None:
        """The most queries that C candidates can still meet; None = no limit."""
        if self.parts.max_calls is None:
            return None
        left = self.parts.max_calls - self._lineage.completions
        return max(0, left // (candidates * self.parts.completions_per_query))

    def _require_calls(self, candidates: int) -> None:
        """Refuse a limit under which C candidates could not be tried once.

        Raises:
            InputError: it is too low.
        """
        limit, fewest = self.parts.max_calls, candidates * self.parts.completions_per_query
        if limit is not None and limit < fewest:
            raise InputError(
                f"search.max_calls is {limit}, but one query takes {fewest} completions "
                f"({candidates} candidates, {self.parts.completions_per_query} of each); raise it"
            )

    @property
    def tried(self) -> Sequence[Mapping[str, Any]]:
        """One row per candidate; see `Lineage`."""
        return self._lineage.rows

    def step(
        self, step: int, seed: int, *, next_seed: int | None = None, time_share: float = 0.0
    ) -> StepResult:
        """Ask, try, and tell; see `Learner.step`."""
        del next_seed, time_share  # a searcher asks for nothing before it was told
        start = time.perf_counter()
        searcher = self.parts.searcher
        before = searcher.state() if self.parts.max_calls is not None else None
        asked = _checked(searcher, searcher.ask())
        asking = time.perf_counter() - start
        limit = self._num_queries(len(asked))
        if limit == 0 and before is not None:
            return self._give_up(len(asked), before)
        batch = self._try(asked, self._met(seed)[:limit], step, seed)
        trials = _trials(asked, batch)
        for trial in trials:
            self._lineage.add(trial, step + 1)
        start = time.perf_counter()
        searcher.tell(trials)
        if self._is_spent:
            logger.info("search.max_calls (%d) is spent: the search ends", self.parts.max_calls)
        return StepResult(
            metrics=self._metrics(batch, trials),
            rows=_rows(batch, asked, searcher.incumbent.id),
            num_tokens=int(batch.lengths.sum()),
            rollout_seconds=batch.rollout_seconds,
            logged=logged_metrics(batch),
            phases={
                "rollout": batch.rollout_seconds,
                "reward": batch.reward_seconds,
                "search": asking + time.perf_counter() - start,
            },
            no_signal=missing_signal(batch.rewards.total),
        )

    def _give_up(self, candidates: int, before: LearnerState) -> StepResult:
        """A step in which nothing is tried, for what was asked for is not paid for.

        The searcher goes back to where it was before it asked, so that a run that is given more
        calls goes on from there.

        Raises:
            InputError: nothing was ever tried.
        """
        if not self._lineage.completions:
            self._require_calls(candidates)
        self.parts.searcher.restore(before)
        self._exhausted = self.parts.max_calls
        logger.info(
            "search.max_calls (%d) leaves too little for %d candidates: the search ends",
            self.parts.max_calls,
            candidates,
        )
        return StepResult(self._standing(0), [], 0, 0.0, no_signal="unscored")

    def prompt_state(self) -> LearnerState:
        """The incumbent's prompt as its artifact would hold it."""
        packed = PackedPrompt.of(self.prompt, self.parts.base)
        return LearnerState(packed.tensors, packed.plain)

    def restored_prompt(self, state: LearnerState) -> Prompt:
        """That prompt, of whatever kind; see `Learner.restored_prompt`."""
        # Of a class of the user's own, a searcher makes prompts only where it starts from one.
        return PackedPrompt(state.tensors, state.plain).unpack(own=(self._start,))

    def state(self) -> LearnerState:
        """The searcher's state, what was tried, and the position in the data."""
        searcher = self.parts.searcher.state()
        return LearnerState(
            {f"search/{name}": tensor.clone() for name, tensor in searcher.tensors.items()},
            {
                "searcher": dict(searcher.plain),
                "tried": self._lineage.state(),
                "exhausted": self._exhausted,
                "source": self.parts.queries.state_dict(),
            },
        )

    def restore(self, state: LearnerState) -> None:
        """Take over what `state` gave; see `Learner.restore`."""
        plain = state.plain
        if "searcher" not in plain:
            raise ValueError("it was learned by gradients")
        own = LearnerState(named_under(state.tensors, "search"), plain["searcher"])
        self.parts.searcher.restore(own)
        self._lineage = Lineage(plain["tried"])
        self._exhausted = plain.get("exhausted")  # runs of earlier versions have none
        self.parts.queries.load_state_dict(plain["source"])

    def close(self) -> None:
        """End threads and processes of the rewards."""
        self.parts.rewards.close()

    def _met(self, seed: int) -> list[Query]:
        """The queries of this step: those the searcher names, or else the next ones."""
        source, named = self.parts.queries, self.parts.searcher.wanted_queries
        return source.next(seed) if named is None else source.as_asked(named, seed)

    def _try(
        self, asked: Sequence[Candidate], queries: Sequence[Query], step: int, seed: int
    ) -> RolloutBatch:
        """Completions of every candidate, candidate by candidate, with their scores."""
        parts = self.parts

        def draw() -> Generation:
            drawn = parts.engine.generate_each(
                [candidate.prompt for candidate in asked],
                queries,
                parts.completions_per_query,
                parts.sampling,
                seed,
            )
            return Generation(tuple(group for each in drawn for group in each.groups))

        return collect(draw, parts.rewards, step=step)

    def _metrics(self, batch: RolloutBatch, trials: Sequence[Trial]) -> dict[str, float]:
        """Means over all candidates of the step, and where the search stands."""
        metrics = completion_metrics(batch) | self._standing(len(trials))
        known = [trial.reward for trial in trials if not trial.rewards.isnan().all()]
        if known:
            metrics["search/best_reward"] = max(known)
        return metrics

    def _standing(self, candidates: int) -> dict[str, float]:
        """Where the search stands after a step of C candidates."""
        return {
            "search/candidates": float(candidates),
            "search/incumbent": float(self.parts.searcher.incumbent.id),
            "search/calls": float(self._lineage.completions),
            "epoch": self.parts.queries.epoch,
        }


def _checked(searcher: Searcher, asked: Sequence[Candidate]) -> Sequence[Candidate]:
    """Refuse what cannot be told apart, or is nothing.

    Raises:
        InputError: the searcher broke its contract.
    """
    name = type(searcher).__name__
    if not asked:
        raise InputError(
            f"the searcher {name} asked for no candidate and is not over; ask for one at least, or "
            "let is_over be True"
        )
    if len({candidate.id for candidate in asked}) < len(asked):
        raise InputError(
            f"the searcher {name} asked for two candidates of one id; give each an id of its own"
        )
    return asked


def _trials(asked: Sequence[Candidate], batch: RolloutBatch) -> list[Trial]:
    """A batch [C * Q * n] as one trial per candidate."""
    queries = len(batch.groups) // len(asked)
    rows = len(batch.rewards.total) // len(asked)
    trials = []
    for place, candidate in enumerate(asked):
        own = slice(place * rows, (place + 1) * rows)
        trials.append(
            Trial(
                candidate,
                batch.groups[place * queries : (place + 1) * queries],
                _table(batch.rewards.total[own], queries),
                {name: _table(v[own], queries) for name, v in batch.rewards.values.items()},
                {name: values[own] for name, values in batch.rewards.extras.items()},
            )
        )
    return trials


def _table(values: Tensor, queries: int) -> Tensor:
    """[Q * n] -> [Q, n], a copy of its own."""
    return values.reshape(queries, -1).clone()


def _rows(
    batch: RolloutBatch, asked: Sequence[Candidate], incumbent: int
) -> list[dict[str, object]]:
    """Rows of `completions.jsonl` with the candidate's id; the incumbent's are the learned ones."""
    rows = completion_rows(batch, "train", "candidate")
    each = len(rows) // len(asked)
    for place, row in enumerate(rows):
        row["candidate"] = asked[place // each].id
        if row["candidate"] == incumbent:
            row["who"] = "learned"
    return rows
