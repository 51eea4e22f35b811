"""One batch, learned from: scoring, minibatches, micro-batches, two-stage backward, optimizer.

Every update makes the prompt's prefix once, runs all micro-batches against its leaves, and carries
the summed gradient into the prompt by one more backward of P tokens.

Letters: B completions, T tokens, P prefix tokens.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rlprompt.algorithms.base import Algorithm, MicroSignal, Signal, TokenLosses
from rlprompt.policy import Policy, TokenScores
from rlprompt.prompts.base import Prompt
from rlprompt.rollout import RolloutBatch
from rlprompt.training.distributed import Ranks
from rlprompt.training.objective import QueryWeights
from rlprompt.training.optimizer import clip_gradients
from rlprompt.training.packing import MicroBatch, pack
from rlprompt.training.rows import (
    Row,
    micro_signal,
    remember,
    remember_states,
    rows_of,
    sampling_logprobs,
    view_of,
)
from rlprompt.types import PrefixKV


class NotFiniteError(RuntimeError):
    """Loss, gradient or updated prompt is NaN or infinite; the caller goes back to a good state."""


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


@dataclass
class UpdateResult:
    """What an update did."""

    losses: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    token_sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """The algorithm's metrics, summed over the tokens that have a weight."""
    num_weighted: int = 0
    """How many those are: TRL's masks too leave out what the loss does not see."""
    row_sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """The algorithm's metrics of completions, summed over those that have a weight."""
    num_weighted_rows: int = 0
    """How many those are."""
    num_sampled: int = 0
    """Tokens that an engine drew."""
    gap_sum: float = 0.0
    """Absolute differences between sampling and training log-probabilities, over those tokens."""
    largest_gap: float = 0.0
    """The largest of them."""
    grad_norm: float = 0.0
    lr: float = 0.0


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
    ) -> None:
        """Join the parts.

        Args:
            policy: whose prompt is trained.
            algorithm: gives signal and losses.
            reference: the prompt of the reference policy; None when none is needed.
            temperature: of the sampling; log-probabilities are tempered alike.
            token_budget: most packed tokens per micro-batch.
            teacher: the prompt of the teacher; None when none is needed.
            query_weights: a robust objective; None when all queries count alike.
            ranks: among whom groups are divided; None when this process is alone.
        """
        self._ranks = ranks or Ranks()
        self._policy = policy
        self._algorithm = algorithm
        self._reference = reference
        self._teacher = teacher
        self._query_weights = query_weights
        self._temperature = temperature or 1.0
        self._budget = token_budget

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
            batch: completions, scored where the algorithm needs rewards.
            optimizer: over the prompt's and the algorithm's parameters.
            set_lr: sets the rate of the coming update and returns it.
            max_grad_norm: see `clip_gradients`.
            clock: gets the seconds of each phase.
            seed: of the order of minibatches.
            rewards: float32 [B] to learn from instead of the batch's totals.

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
        self._score_before(batch, rows, clock)
        view = view_of(batch, batch.rewards.total if rewards is None else rewards, rows)
        robust = None
        if self._query_weights is not None:
            queries = [group.query for group in batch.groups]
            robust = self._query_weights.row_weights(view, queries)
        whole = _Batch(batch, rows, self._algorithm.signal(view), robust)
        order = torch.Generator().manual_seed(seed)
        results = []
        for _ in range(self._algorithm.num_epochs):
            for groups in self._minibatches(len(batch.groups), order):
                lr = set_lr()
                optimizer.zero_grad(set_to_none=True)
                result = self.gradient(whole, groups, clock)
                self._apply(result, optimizer, lr, max_grad_norm)
                clock.lap("optimizer")
                results.append(result)
        metrics = _merge(results, whole.signal)
        return whole.signal, {**metrics, **self._algorithm.after_batch(metrics)}

    def gradient(
        self, batch: _Batch, groups: Sequence[int] | None, clock: PhaseClock
    ) -> UpdateResult:
        """Accumulate the gradient over the micro-batches of some groups; see the module."""
        result = UpdateResult()
        policy = self._policy
        chosen = range(len(batch.rows)) if groups is None else groups
        weights = self._token_weights(batch, chosen)
        shared = policy.shared_prefix()
        clock.lap("prefill")
        for micro, is_own in self._turns(batch.rollouts, policy.prompt, chosen):
            rows = _rows_in(micro, batch.rows)
            scores = self._scores(batch.rollouts, micro, shared.leaves, policy.prompt)
            if not is_own:
                (0.0 * scores.logprobs.sum()).backward()
                continue
            part = micro_signal(rows, batch.signal, (weights, batch.robust), scores)
            losses = self._algorithm.losses(scores, part)
            clock.lap("forward")
            losses.total().backward()
            clock.lap("backward")
            _account(result, losses, scores, part, rows)
            if any(row.old_logprobs is None for row in rows):
                remember(rows, "old_logprobs", scores.logprobs)
        policy.finish_prefix(shared)
        clock.lap("backward")
        if self._ranks.size == 1:
            return result
        self._ranks.sum_gradients(self.trained)
        total = _summed(self._ranks.each(lambda: result, "the losses"))
        clock.lap("ranks")
        return total

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
        count = min(self._algorithm.num_minibatches, num_groups)
        if count == 1:
            return [list(range(num_groups))]
        mixed = torch.randperm(num_groups, generator=order)
        return [sorted(part.tolist()) for part in mixed.tensor_split(count)]

    def _token_weights(self, batch: _Batch, groups: Sequence[int]) -> Tensor:
        """[B]: what one token of each row counts for in an update on these groups."""
        index = torch.tensor([row.index for g in groups for row in batch.rows[g]])
        out = torch.zeros(len(batch.rollouts.completions))
        out[index] = self._algorithm.token_weights(batch.signal.counted_lengths[index]).to(out)
        return out

    def _turns(
        self, batch: RolloutBatch, prompt: Prompt, groups: Sequence[int]
    ) -> list[tuple[MicroBatch, bool]]:
        """This rank's micro-batches; ranks that share weights all take the same number of turns.

        A turn without work of its own, marked False, runs some micro-batch for the others' sake.
        """
        own = [g for g in groups if self._ranks.owns(g)]
        turns = [(micro, True) for micro in self._micro_batches(batch, prompt, own)]
        if self._policy.base.shards is None:
            return turns
        spare = self._micro_batches(batch, prompt, groups[:1])[0]
        missing = self._ranks.largest(len(turns)) - len(turns)
        return turns + [(spare, False)] * missing

    def _micro_batches(
        self, batch: RolloutBatch, prompt: Prompt, groups: Sequence[int]
    ) -> list[MicroBatch]:
        chosen = [batch.groups[g] for g in groups]
        queries = [len(self._policy.query_ids(group.query, prompt)) for group in chosen]
        lengths = [[len(c.token_ids) for c in group.completions] for group in chosen]
        packed = pack(queries, lengths, self._budget, self._algorithm.whole_groups)
        return [
            MicroBatch(tuple((groups[g], places) for g, places in micro.rows), micro.num_tokens)
            for micro in packed
        ]

    def _scores(
        self, batch: RolloutBatch, micro: MicroBatch, prefix: PrefixKV, prompt: Prompt
    ) -> TokenScores:
        tree = self._policy.tree(
            [batch.groups[g].query for g, _ in micro.rows],
            [[batch.groups[g].completions[i] for i in places] for g, places in micro.rows],
            prefix,
            prompt,
        )
        return self._policy.logprobs(tree, prefix, self._temperature, self._algorithm.entropy_grad)

    @torch.no_grad()
    def _score_before(self, batch: RolloutBatch, rows: list[list[Row]], clock: PhaseClock) -> None:
        """Fill in what the algorithm needs of every row before the first update."""
        needs = self._algorithm.needs
        weighing = self._query_weights is not None and self._query_weights.needs_logprobs
        if needs & {"old_logprobs", "values"} or self._algorithm.num_minibatches > 1 or weighing:
            for chosen, scores in self._score_all(batch, rows, self._policy.prompt):
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
        if self._ranks.size > 1 and (needs - {"teacher_states"} or weighing):
            self._share_rows(rows)
            clock.lap("ranks")

    def _share_rows(self, rows: list[list[Row]]) -> None:
        """Give every rank what the others know per token: the signal looks at the whole batch.

        The teacher's states, which are large, stay with the rank that learns from them.
        """
        names = ("old_logprobs", "ref_logprobs", "old_values")
        own = [row for g, group in enumerate(rows) if self._ranks.owns(g) for row in group]
        known = {row.index: [getattr(row, name) for name in names] for row in own}
        flat = {row.index: row for group in rows for row in group}
        for part in self._ranks.each(lambda: known, "the scores before the update"):
            for index, values in part.items():
                for name, value in zip(names, values, strict=True):
                    setattr(flat[index], name, value)

    def _score_all(
        self, batch: RolloutBatch, rows: list[list[Row]], prompt: Prompt
    ) -> Iterator[tuple[list[Row], TokenScores]]:
        """Scores of all rows under a prompt, micro-batch by micro-batch."""
        prefix = self._policy.prefix(prompt)
        for micro, is_own in self._turns(batch, prompt, range(len(rows))):
            scores = self._scores(batch, micro, prefix, prompt)
            if is_own:
                yield _rows_in(micro, rows), scores


def _summed(parts: Sequence[UpdateResult]) -> UpdateResult:
    """What all ranks did together."""
    total = parts[0]
    for part in parts[1:]:
        for mine, other in (
            (total.losses, part.losses),
            (total.token_sums, part.token_sums),
            (total.row_sums, part.row_sums),
        ):
            for name, value in other.items():
                mine[name] += value
        total.num_weighted += part.num_weighted
        total.num_weighted_rows += part.num_weighted_rows
        total.num_sampled += part.num_sampled
        total.gap_sum += part.gap_sum
        total.largest_gap = max(total.largest_gap, part.largest_gap)
    return total


def _rows_in(micro: MicroBatch, rows: Sequence[Sequence[Row]]) -> list[Row]:
    return [rows[g][i] for g, places in micro.rows for i in places]


def _account(
    result: UpdateResult,
    losses: TokenLosses,
    scores: TokenScores,
    signal: MicroSignal,
    rows: Sequence[Row],
) -> None:
    """Add a micro-batch's losses and token sums to the update's."""
    for name in ("rl", "kl", "ce", "value"):
        part = getattr(losses, name)
        if part is not None:
            result.losses[f"loss/{name}"] += float(part.detach())
    weighted = signal.weights > 0
    for name, values in (losses.metrics or {}).items():
        result.token_sums[name] += float((values * weighted).sum())
    result.num_weighted += int(weighted.sum())
    weighted_rows = weighted.any(dim=1)
    for name, values in (losses.row_metrics or {}).items():
        result.row_sums[name] += float((values * weighted_rows).sum())
    result.num_weighted_rows += int(weighted_rows.sum())
    sampled = sampling_logprobs(rows, scores)
    if sampled is None:
        return
    gap = ((scores.logprobs.detach() - sampled) * scores.mask).abs()
    result.gap_sum += float(gap.sum())
    result.largest_gap = max(result.largest_gap, float(gap.max()))
    result.num_sampled += int(scores.mask.sum())


def _merge(results: Sequence[UpdateResult], signal: Signal) -> dict[str, float]:
    """Means over tokens or completions, then over updates; a mean over none is left out."""
    out: dict[str, float] = defaultdict(float)
    for result in results:
        share = 1.0 / len(results)
        for name, value in result.token_sums.items() if result.num_weighted else ():
            out[name] += share * value / result.num_weighted
        for name, value in result.row_sums.items() if result.num_weighted_rows else ():
            out[name] += share * value / result.num_weighted_rows
        for name, value in result.losses.items():
            out[name] += share * value
        out["loss"] += share * sum(result.losses.values())
        out["prompt/grad_norm"] += share * result.grad_norm
    # Later updates are off-policy on purpose: only the first compares like with like.
    first = results[0]
    if first.num_sampled:
        out["sampling/sampling_logp_difference/mean"] = first.gap_sum / first.num_sampled
        out["sampling/sampling_logp_difference/max"] = first.largest_gap
    out["lr"] = results[-1].lr
    return {**out, **signal.metrics}
