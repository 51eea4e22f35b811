"""One batch, learned from: scoring, minibatches, micro-batches, two-stage backward, optimizer.

Every update makes the prompt's prefix once, runs all micro-batches against its leaves, and carries
the summed gradient into the prompt by one more backward of P tokens. Where queries are asked under
other system text beside the prompt, that happens once for each such text.

Letters: B completions, T tokens, P prefix tokens.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from rlprompt.algorithms.base import Algorithm, Signal
from rlprompt.algorithms.robust import QueryWeights
from rlprompt.distributed.balance import owners
from rlprompt.distributed.ranks import Ranks
from rlprompt.errors import InputError
from rlprompt.policy import Policy, TokenScores
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.surroundings import asked_under
from rlprompt.rollout.collect import RolloutBatch
from rlprompt.rollout.packing import MicroBatch, pack
from rlprompt.runs.learner import NotFiniteError
from rlprompt.training.optimizer import clip_gradients
from rlprompt.training.rows import (
    Row,
    micro_signal,
    remember,
    remember_states,
    rows_of,
    view_of,
)
from rlprompt.training.update_metrics import UpdateResult, account, merged, summed
from rlprompt.types import PrefixKV, Surroundings

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LEAST_TOKENS = 64
"""No micro-batch budget is made smaller than this when memory runs out."""


class PhaseClock:
    """Seconds by phase."""

    def __init__(self) -> None:
        """Start at zero."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def lap(self, phase: str | None) -> None:
        """Add the time since the last lap to a phase; None drops it."""
        now = time.perf_counter()
        if phase is not None:
            self.seconds[phase] += now - self._last
        self._last = now


@dataclass(frozen=True)
class _Batch:
    """A batch that is being learned from."""

    rollouts: RolloutBatch
    rows: list[list[Row]]
    signal: Signal
    robust: Tensor | None
    """[B] weights of a robust objective."""


class Updater:
    """Applies an algorithm to batches."""

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        reference: Prompt | None,
        *,
        temperature: float,
        token_budget: int,
        teacher: Prompt | None = None,
        query_weights: QueryWeights | None = None,
        ranks: Ranks | None = None,
        importance_cap: float | None = None,
    ) -> None:
        """Join the parts.

        Args:
            policy: the policy whose prompt is trained.
            algorithm: the algorithm, which gives signal and losses.
            reference: the prompt of the reference policy; None when none is needed.
            temperature: the temperature of the sampling; log-probabilities are tempered alike.
            token_budget: the most packed tokens of a micro-batch.
            teacher: the prompt of the teacher; None when none is needed.
            query_weights: a robust objective; None when all queries count alike.
            ranks: the ranks among whom completions are divided; None when this process is alone.
            importance_cap: the largest weight that corrects for how the engine drew tokens; None
                when none does.
        """
        self._importance_cap = importance_cap
        self._ranks = ranks or Ranks()
        self._policy = policy
        self._algorithm = algorithm
        self._reference = reference
        self._teacher = teacher
        self._query_weights = query_weights
        self._temperature = temperature or 1.0
        self._budget = token_budget

    def updates_on(self, num_groups: int) -> int:
        """Updates that a batch of so many groups gets."""
        return self._algorithm.num_epochs * self._num_minibatches(num_groups)

    def learn(
        self,
        batch: RolloutBatch,
        optimizer: torch.optim.Optimizer,
        set_lr: Callable[[], float],
        max_grad_norm: float | None,
        clock: PhaseClock,
        *,
        seed: int = 0,
        rewards: Tensor | None = None,
    ) -> tuple[Signal, dict[str, float]]:
        """Run all updates on a batch.

        Args:
            batch: the completions, scored where the algorithm needs rewards.
            optimizer: the optimizer over the prompt's and the algorithm's parameters.
            set_lr: what sets the rate of the coming update and returns it.
            max_grad_norm: the largest norm of a gradient, see `clip_gradients`.
            clock: the clock that gets the seconds of each phase.
            seed: the seed of the order of minibatches.
            rewards: float32 [B], the rewards to learn from instead of the batch's totals.

        Returns:
            The signal, and metrics under their logged names (means over the updates).

        Raises:
            NotFiniteError: the loss or its gradient is not finite, or an update made the prompt so.
                Earlier updates on this batch have been applied.
        """
        with self._policy.whole_ends():
            return self._learn(batch, optimizer, set_lr, max_grad_norm, clock, seed, rewards)

    def _learn(
        self,
        batch: RolloutBatch,
        optimizer: torch.optim.Optimizer,
        set_lr: Callable[[], float],
        max_grad_norm: float | None,
        clock: PhaseClock,
        seed: int,
        rewards: Tensor | None,
    ) -> tuple[Signal, dict[str, float]]:
        clock.lap(None)
        rows = rows_of(batch)
        order = torch.Generator().manual_seed(seed)
        passes = [
            self._minibatches(len(batch.groups), order) for _ in range(self._algorithm.num_epochs)
        ]
        self._divide(batch, rows, passes[0])
        self._in_memory(lambda: self._score_before(batch, rows, clock))
        if self._ranks.size > 1:
            self._share_rows(rows)
            clock.lap("ranks")
        view = view_of(batch, batch.rewards.total if rewards is None else rewards, rows)
        robust = None
        if self._query_weights is not None:
            queries = [group.query for group in batch.groups]
            robust = self._query_weights.row_weights(view, queries)
        whole = _Batch(batch, rows, self._algorithm.signal(view), robust)
        results = []
        for groups in (groups for each in passes for groups in each):
            lr = set_lr()
            optimizer.zero_grad(set_to_none=True)
            result = self.gradient(whole, groups, clock)
            self._apply(result, optimizer, lr, max_grad_norm)
            clock.lap("optimizer")
            results.append(result)
        metrics = merged(results, whole.signal, prefetched=batch.prefetched)
        return whole.signal, {**metrics, **self._algorithm.after_batch(metrics)}

    def gradient(
        self, batch: _Batch, groups: Sequence[int] | None, clock: PhaseClock
    ) -> UpdateResult:
        """Accumulate the gradient over the micro-batches of some groups; see the module."""
        chosen = range(len(batch.rows)) if groups is None else groups
        result = self._in_memory(lambda: self._accumulate(batch, chosen, clock))
        if self._ranks.size == 1:
            return result
        self._ranks.sum_gradients(self.trained)
        total = summed(self._ranks.each(lambda: result, "the losses"))
        clock.lap("ranks")
        return total

    def _in_memory(self, work: Callable[[], T]) -> T:
        """Do something, with smaller micro-batches when memory runs out."""
        while True:
            try:
                return work()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._check_can_halve(error)
            self._budget //= 2
            logger.warning("out of memory: micro-batches have %d tokens from now on", self._budget)
            for parameter in self.trained:
                parameter.grad = None
            gc.collect()  # the graph of what failed
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _check_can_halve(self, error: BaseException) -> None:
        """Raise `InputError` where smaller micro-batches are no way out."""
        lost = f"memory ran out in an update with micro-batches of {self._budget} tokens"
        if self._policy.base.shards is not None:
            # The other ranks would wait for the turns that this one repeats.
            raise InputError(
                f"{lost}, which a rank with a base in shards cannot make smaller on its own; "
                "lower training.token_budget and go on with --resume"
            ) from error
        if self._budget < 2 * _LEAST_TOKENS:
            raise InputError(
                f"{lost}, the smallest there are; lower sampling.max_tokens, or go on with "
                "--resume on a machine with more memory"
            ) from error

    def _accumulate(self, batch: _Batch, chosen: Sequence[int], clock: PhaseClock) -> UpdateResult:
        """The gradient of this rank's share."""
        result = UpdateResult()
        policy = self._policy
        weights = self._token_weights(batch, chosen)
        for around, groups in _by_surroundings(batch.rollouts, chosen):
            prompt = asked_under(policy.prompt, around, is_trained=True)
            shared = policy.shared_prefix(prompt)
            clock.lap("prefill")
            for micro, is_own in self._turns(batch.rollouts, batch.rows, prompt, groups):
                rows = _rows_in(micro, batch.rows)
                scores = self._scores(batch.rollouts, micro, shared.leaves, prompt)
                if not is_own:
                    (0.0 * scores.logprobs.sum()).backward()
                    continue
                part = micro_signal(
                    rows, batch.signal, weights, batch.robust, scores, self._importance_cap
                )
                losses = self._algorithm.losses(scores, part)
                clock.lap("forward")
                losses.total().backward()
                clock.lap("backward")
                account(result, losses, scores, part, rows)
                if any(row.old_logprobs is None for row in rows):
                    remember(rows, "old_logprobs", scores.logprobs)
            policy.finish_prefix(shared, prompt)
            clock.lap("backward")
        return result

    @property
    def trained(self) -> list[nn.Parameter]:
        """The prompt's parameters and the algorithm's own."""
        own = [p for part in self._algorithm.own_parameters() for p in part.parameters]
        return [*self._policy.parameters(), *own]

    def _apply(
        self,
        result: UpdateResult,
        optimizer: torch.optim.Optimizer,
        lr: float,
        max_grad_norm: float | None,
    ) -> None:
        """Clip, check, and take the optimizer's step."""
        result.lr = lr
        result.grad_norm = clip_gradients(self._policy.parameters(), max_grad_norm)
        own = [p for part in self._algorithm.own_parameters() for p in part.parameters]
        own_norm = clip_gradients(own, max_grad_norm)
        values = {**result.losses, "gradient norm": result.grad_norm, "own gradient norm": own_norm}
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            raise NotFiniteError(f"{', '.join(wrong)} is not finite")
        optimizer.step()
        self._policy.prompt.constrain()
        self._ranks.copy_first(self.trained)
        if not all(bool(p.isfinite().all()) for p in self._policy.parameters()):
            raise NotFiniteError(
                f"the prompt after an update at learning rate {lr:g} is not finite"
            )

    def _minibatches(self, num_groups: int, order: torch.Generator) -> list[list[int]]:
        """Groups of each update of a pass; one minibatch keeps the order."""
        count = self._num_minibatches(num_groups)
        if count == 1:
            return [list(range(num_groups))]
        mixed = torch.randperm(num_groups, generator=order)
        return [sorted(part.tolist()) for part in mixed.tensor_split(count)]

    def _num_minibatches(self, num_groups: int) -> int:
        """Updates of a pass: each needs a group of its own."""
        return min(self._algorithm.num_minibatches, num_groups)

    def _token_weights(self, batch: _Batch, groups: Sequence[int]) -> Tensor:
        """[B]: what one token of each row counts for in an update on these groups."""
        index = torch.tensor([row.index for g in groups for row in batch.rows[g]])
        out = torch.zeros(len(batch.rollouts.completions))
        out[index] = self._algorithm.token_weights(batch.signal.counted_lengths[index]).to(out)
        return out

    def _divide(
        self, batch: RolloutBatch, rows: list[list[Row]], minibatches: Sequence[Sequence[int]]
    ) -> None:
        """Say which rank learns from which row, evenly in each minibatch of the first pass.

        Later passes leave rows where they are, since what is known of them per token lies there.
        """
        if self._ranks.size == 1:
            return
        for groups in minibatches:
            divided = owners(
                [len(self._policy.query_ids(batch.groups[g].query)) for g in groups],
                [[len(row.completion.token_ids) for row in rows[g]] for g in groups],
                self._ranks.size,
                self._algorithm.whole_groups,
            )
            for g, ranks in zip(groups, divided, strict=True):
                for row, rank in zip(rows[g], ranks, strict=True):
                    row.rank = rank

    def _turns(
        self,
        batch: RolloutBatch,
        rows: Sequence[Sequence[Row]],
        prompt: Prompt,
        groups: Sequence[int],
    ) -> list[tuple[MicroBatch, bool]]:
        """This rank's micro-batches; ranks that share weights all take the same number of turns.

        A turn without work of its own, marked False, runs some micro-batch for the others' sake.
        """
        rank = self._ranks.rank
        own = {g: [i for i, row in enumerate(rows[g]) if row.rank == rank] for g in groups}
        own = {g: places for g, places in own.items() if places}
        turns = [(micro, True) for micro in self._micro_batches(batch, prompt, own)]
        if self._policy.base.shards is None:
            return turns
        least = range(len(rows[groups[0]]) if self._algorithm.whole_groups else 1)
        spare = self._micro_batches(batch, prompt, {groups[0]: least})[0]
        missing = self._ranks.largest(len(turns)) - len(turns)
        return turns + [(spare, False)] * missing

    def _micro_batches(
        self, batch: RolloutBatch, prompt: Prompt, chosen: Mapping[int, Sequence[int]]
    ) -> list[MicroBatch]:
        """Micro-batches of some completions, by group."""
        groups = list(chosen)
        queries = [len(self._policy.query_ids(batch.groups[g].query, prompt)) for g in groups]
        lengths = [
            [len(batch.groups[g].completions[i].token_ids) for i in chosen[g]] for g in groups
        ]
        packed = pack(queries, lengths, self._budget, self._algorithm.whole_groups)
        found = []
        for micro in packed:
            named = ((groups[place], own) for place, own in micro.rows)
            rows = tuple((g, tuple(chosen[g][i] for i in own)) for g, own in named)
            found.append(MicroBatch(rows, micro.num_tokens))
        return found

    def _scores(
        self, batch: RolloutBatch, micro: MicroBatch, prefix: PrefixKV, prompt: Prompt
    ) -> TokenScores:
        queries = [batch.groups[g].query for g, _ in micro.rows]
        drawn = [[batch.groups[g].completions[i] for i in places] for g, places in micro.rows]
        tree = self._policy.tree(queries, drawn, prefix, prompt)
        products = None
        if batch.products is not None:
            completions = [completion for group in drawn for completion in group]
            products = batch.products.rows(completions, prefix, tree.queries.num_tokens)
        return self._policy.logprobs(
            tree, prefix, self._temperature, self._algorithm.entropy_grad, products
        )

    @torch.no_grad()
    def _score_before(self, batch: RolloutBatch, rows: list[list[Row]], clock: PhaseClock) -> None:
        """Fill in what the algorithm needs of every row before the first update."""
        needs = self._algorithm.needs
        weighing = self._query_weights is not None and self._query_weights.needs_logprobs
        later = self._num_minibatches(len(batch.groups)) > 1 and not batch.prefetched
        if needs & {"old_logprobs", "values"} or later or weighing:
            for chosen, scores in self._score_all(batch, rows, self._policy.prompt, True):
                remember(chosen, "old_logprobs", scores.logprobs)
                if "values" in needs:
                    values = self._algorithm.values(scores.states)
                    remember(chosen, "old_values", scores.unflatten(values))
            clock.lap("old_logprobs")
        if "ref_logprobs" in needs:
            assert self._reference is not None
            for chosen, scores in self._score_all(batch, rows, self._reference):
                remember(chosen, "ref_logprobs", scores.logprobs)
            clock.lap("reference")
        if "teacher_states" in needs:
            assert self._teacher is not None
            for chosen, scores in self._score_all(batch, rows, self._teacher):
                remember_states(chosen, scores.states)
            clock.lap("teacher")

    def _share_rows(self, rows: list[list[Row]]) -> None:
        """Give every rank what the others know per token: the signal looks at the whole batch.

        The teacher's states, which are large, stay with the rank that learns from them.
        """
        names = ("old_logprobs", "ref_logprobs", "old_values")
        own = [row for group in rows for row in group if row.rank == self._ranks.rank]
        known = {row.index: [getattr(row, name) for name in names] for row in own}
        flat = {row.index: row for group in rows for row in group}
        for part in self._ranks.each(lambda: known, "the scores before the update"):
            for index, values in part.items():
                for name, value in zip(names, values, strict=True):
                    setattr(flat[index], name, value)

    def _score_all(
        self, batch: RolloutBatch, rows: list[list[Row]], prompt: Prompt, is_trained: bool = False
    ) -> Iterator[tuple[list[Row], TokenScores]]:
        """Scores of all rows under a prompt, micro-batch by micro-batch."""
        for around, groups in _by_surroundings(batch, range(len(rows)), frames=is_trained):
            under = asked_under(prompt, around, is_trained=is_trained)
            prefix = self._policy.prefix(under)
            for micro, is_own in self._turns(batch, rows, under, groups):
                scores = self._scores(batch, micro, prefix, under)
                if is_own:
                    yield _rows_in(micro, rows), scores


def _by_surroundings(
    batch: RolloutBatch, chosen: Sequence[int], frames: bool = True
) -> list[tuple[Surroundings | None, list[int]]]:
    """Groups by the other system text that they are asked under, in the order of the first ones.

    Args:
        batch: batch, the same on every rank.
        chosen: numbers of groups.
        frames: whether frames around the trained prompt count.
    """
    found: dict[Surroundings | None, list[int]] = {}
    for group in chosen:
        around = batch.groups[group].query.around
        if around is not None and around.is_frame and not frames:
            around = None
        found.setdefault(around, []).append(group)
    return list(found.items())


def _is_out_of_memory(error: BaseException) -> bool:
    """Also on a CPU, where torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _rows_in(micro: MicroBatch, rows: Sequence[Sequence[Row]]) -> list[Row]:
    return [rows[g][i] for g, places in micro.rows for i in places]
