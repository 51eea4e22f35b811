"""One rollout batch, learned from: micro-batches, two-stage backward, optimizer.

Every update makes the prompt's prefix once, runs all micro-batches against its leaves, and carries
the summed gradient into the prompt by one more backward of P tokens.

Letters: B completions, T tokens, P prefix tokens.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlprompt.algorithms.base import Algorithm, MicroSignal, Signal, TokenLosses
from rlprompt.policy import Policy, SharedPrefix, TokenScores
from rlprompt.prompts.base import Prompt
from rlprompt.rollout import RolloutBatch
from rlprompt.training.optimizer import clip_gradients
from rlprompt.training.packing import MicroBatch, pack
from rlprompt.types import Completion, PrefixKV


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
class _Row:
    """What is known of one completion across updates."""

    signal_index: int
    completion: Completion
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None


@dataclass
class UpdateResult:
    """What an update did."""

    losses: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    token_sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """The algorithm's metrics, summed over the tokens that have a weight."""
    num_weighted: int = 0
    """How many those are: TRL's masks too leave out what the loss does not see."""
    num_tokens: int = 0
    """Tokens of all completions."""
    gap_sum: float = 0.0
    """Absolute differences between sampling and training log-probabilities, over all tokens."""
    largest_gap: float = 0.0
    """The largest of them."""
    grad_norm: float = 0.0
    lr: float = 0.0


class Updater:
    """Applies an algorithm to rollout batches."""

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        reference: Prompt | None,
        *,
        temperature: float,
        token_budget: int,
    ) -> None:
        """Join the parts.

        Args:
            policy: whose prompt is trained.
            algorithm: gives signal and losses.
            reference: the prompt of the reference policy; None when none is needed.
            temperature: of the sampling; log-probabilities are tempered alike.
            token_budget: most packed tokens per micro-batch.
        """
        self._policy = policy
        self._algorithm = algorithm
        self._reference = reference
        self._temperature = temperature or 1.0
        self._budget = token_budget

    def learn(
        self,
        batch: RolloutBatch,
        optimizer: torch.optim.Optimizer,
        set_lr: Callable[[], float],
        max_grad_norm: float | None,
        clock: PhaseClock,
    ) -> tuple[Signal, dict[str, float]]:
        """Run all updates on a rollout batch.

        Args:
            batch: scored completions.
            optimizer: over the prompt's parameters.
            set_lr: sets the rate of the coming update and returns it.
            max_grad_norm: see `clip_gradients`.
            clock: gets the seconds of each phase.

        Returns:
            The signal, and metrics under their logged names (means over the updates).

        Raises:
            NotFiniteError: the loss or its gradient is not finite, or an update made the prompt so.
                Earlier updates on this batch have been applied.
        """
        clock.lap(None)
        signal = self._algorithm.signal(batch.rewards.total, batch.lengths, batch.terminated)
        rows = self._rows(batch)
        if self._reference is not None:
            self._score_reference(batch, rows, clock)
        results = []
        for _ in range(self._algorithm.num_updates):
            lr = set_lr()
            optimizer.zero_grad(set_to_none=True)
            result = self.gradient(batch, rows, signal, clock)
            result.grad_norm = clip_gradients(self._policy.parameters(), max_grad_norm)
            self._check_finite(result)
            optimizer.step()
            self._policy.prompt.constrain()
            if not all(bool(p.isfinite().all()) for p in self._policy.parameters()):
                raise NotFiniteError(
                    f"the prompt after an update at learning rate {lr:g} is not finite"
                )
            result.lr = lr
            clock.lap("optimizer")
            results.append(result)
        return signal, _merge(results, signal)

    def gradient(
        self,
        batch: RolloutBatch,
        rows: list[list[_Row]],
        signal: Signal,
        clock: PhaseClock,
    ) -> UpdateResult:
        """Accumulate the prompt's gradient over all micro-batches; see the module."""
        result = UpdateResult()
        policy = self._policy
        shared = SharedPrefix(policy.prefix())
        clock.lap("prefill")
        for micro in self._micro_batches(batch, policy.prompt):
            chosen = [[rows[g][i] for i in places] for g, places in micro.rows]
            scores = self._scores(batch, micro, chosen, shared.leaves, policy.prompt)
            flat = [row for group in chosen for row in group]
            micro_signal = _micro_signal(flat, signal, scores)
            losses = self._algorithm.losses(scores, micro_signal)
            clock.lap("forward")
            losses.total().backward()
            clock.lap("backward")
            _account(result, losses, scores, micro_signal, flat)
            for row, logprobs in zip(flat, scores.logprobs.detach(), strict=True):
                if row.old_logprobs is None:
                    row.old_logprobs = logprobs[: len(row.completion.token_ids)].clone()
        shared.backward()
        clock.lap("backward")
        return result

    def _rows(self, batch: RolloutBatch) -> list[list[_Row]]:
        rows: list[list[_Row]] = []
        index = 0
        for group in batch.groups:
            rows.append([_Row(index + i, c) for i, c in enumerate(group.completions)])
            index += len(group.completions)
        return rows

    def _micro_batches(self, batch: RolloutBatch, prompt: Prompt) -> list[MicroBatch]:
        queries = [len(self._policy.query_ids(group.query, prompt)) for group in batch.groups]
        lengths = [[len(c.token_ids) for c in group.completions] for group in batch.groups]
        return pack(queries, lengths, self._budget)

    def _scores(
        self,
        batch: RolloutBatch,
        micro: MicroBatch,
        chosen: list[list[_Row]],
        prefix: PrefixKV,
        prompt: Prompt,
    ) -> TokenScores:
        tree = self._policy.tree(
            [batch.groups[g].query for g, _ in micro.rows],
            [[row.completion for row in group] for group in chosen],
            prefix,
            prompt,
        )
        return self._policy.logprobs(tree, prefix, self._temperature, self._algorithm.entropy_grad)

    @torch.no_grad()
    def _score_reference(
        self, batch: RolloutBatch, rows: list[list[_Row]], clock: PhaseClock
    ) -> None:
        assert self._reference is not None
        prefix = self._policy.prefix(self._reference)
        for micro in self._micro_batches(batch, self._reference):
            chosen = [[rows[g][i] for i in places] for g, places in micro.rows]
            scores = self._scores(batch, micro, chosen, prefix, self._reference)
            flat = [row for group in chosen for row in group]
            for row, logprobs in zip(flat, scores.logprobs, strict=True):
                row.ref_logprobs = logprobs[: len(row.completion.token_ids)].clone()
        clock.lap("reference")

    def _check_finite(self, result: UpdateResult) -> None:
        values = {**result.losses, "gradient norm": result.grad_norm}
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            raise NotFiniteError(f"{', '.join(wrong)} is not finite")


def _micro_signal(rows: Sequence[_Row], signal: Signal, scores: TokenScores) -> MicroSignal:
    index = torch.tensor([row.signal_index for row in rows])
    device = scores.logprobs.device
    weights = signal.weights[index][:, None].to(device) * scores.mask
    return MicroSignal(
        advantages=signal.advantages[index][:, None].to(device),
        weights=weights,
        old_logprobs=_padded([row.old_logprobs for row in rows], scores),
        ref_logprobs=_padded([row.ref_logprobs for row in rows], scores),
    )


def _padded(rows: Sequence[Tensor | None], scores: TokenScores) -> Tensor | None:
    """Ragged rows as [B, T]; None when they are not known yet."""
    out = torch.zeros_like(scores.logprobs)
    for place, row in enumerate(rows):
        if row is None:
            return None
        out[place, : row.shape[0]] = row
    return out


def _account(
    result: UpdateResult,
    losses: TokenLosses,
    scores: TokenScores,
    signal: MicroSignal,
    rows: Sequence[_Row],
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
    sampled = _padded([torch.tensor(r.completion.sampling_logprobs) for r in rows], scores)
    assert sampled is not None
    gap = ((scores.logprobs.detach() - sampled) * scores.mask).abs()
    result.gap_sum += float(gap.sum())
    result.largest_gap = max(result.largest_gap, float(gap.max()))
    result.num_tokens += int(scores.mask.sum())


def _merge(results: Sequence[UpdateResult], signal: Signal) -> dict[str, float]:
    """Means over tokens, then over updates; a mean over no tokens is left out."""
    out: dict[str, float] = defaultdict(float)
    for result in results:
        share = 1.0 / len(results)
        for name, value in result.token_sums.items() if result.num_weighted else ():
            out[name] += share * value / result.num_weighted
        for name, value in result.losses.items():
            out[name] += share * value
        out["loss"] += share * sum(result.losses.values())
        out["prompt/grad_norm"] += share * result.grad_norm
    # Later updates are off-policy on purpose: only the first compares like with like.
    first = results[0]
    out["sampling/sampling_logp_difference/mean"] = first.gap_sum / first.num_tokens
    out["sampling/sampling_logp_difference/max"] = first.largest_gap
    out["lr"] = results[-1].lr
    return {**out, **signal.metrics}
