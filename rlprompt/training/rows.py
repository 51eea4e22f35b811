"""What is known of each completion across the updates on its batch.

Completions have different lengths and meet in different micro-batches, so everything per token is
kept ragged, row by row, and padded only where a function of tensors asks for it.

Letters: B completions, b rows of a micro-batch, T tokens, M = all tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlprompt.algorithms.base import BatchView, Importance, MicroSignal, Signal
from rlprompt.policy import TokenScores
from rlprompt.rollout.collect import RolloutBatch
from rlprompt.types import Completion


@dataclass
class Row:
    """One completion."""

    index: int
    """Place in the batch."""
    completion: Completion
    rank: int = 0
    """The rank that learns from it."""
    sampling_logprobs: Tensor | None = None
    """[T] that it was drawn with, where that was ahead of the batch's turn: what its probability
    ratio is taken against."""
    old_logprobs: Tensor | None = None
    """[T] under the prompt before the first update."""
    ref_logprobs: Tensor | None = None
    """[T] under the reference."""
    old_values: Tensor | None = None
    """[T] before the first update."""
    teacher_states: Tensor | None = None
    """[T, d] the teacher's final hidden states."""


def rows_of(batch: RolloutBatch) -> list[list[Row]]:
    """Fresh rows, group by group."""
    rows: list[list[Row]] = []
    index = 0
    for group in batch.groups:
        rows.append([Row(index + i, c) for i, c in enumerate(group.completions)])
        index += len(group.completions)
        if batch.prefetched:
            for row in rows[-1]:
                row.sampling_logprobs = _drawn_with(row.completion)
    return rows


def view_of(batch: RolloutBatch, rewards: Tensor, rows: Sequence[Sequence[Row]]) -> BatchView:
    """What the algorithm may look at.

    Args:
        batch: the batch, of which lengths and endings.
        rewards: float32 [B], the batch's totals, or what constraints made of them.
        rows: the rows, scored as far as the algorithm needs.
    """
    flat = [row for group in rows for row in group]
    width = int(batch.lengths.max())
    return BatchView(
        rewards=rewards,
        lengths=batch.lengths,
        terminated=batch.terminated,
        group_size=len(rows[0]),
        old_logprobs=_stack([row.old_logprobs for row in flat], width),
        ref_logprobs=_stack([row.ref_logprobs for row in flat], width),
        values=_stack([row.old_values for row in flat], width),
    )


def micro_signal(
    rows: Sequence[Row],
    signal: Signal,
    token_weights: Tensor,
    robust_weights: Tensor | None,
    scores: TokenScores,
    importance_cap: float | None = None,
) -> MicroSignal:
    """The part of a signal that belongs to the rows of a micro-batch.

    Args:
        rows: rows of the micro-batch, in the order of `scores`.
        signal: signal of the whole batch.
        token_weights: [B] what one token of each row counts for in this update.
        robust_weights: [B] what a robust objective makes of each row; None = nothing.
        scores: scores of the micro-batch.
        importance_cap: largest weight that corrects for how tokens were drawn; None = none does.
    """
    index = torch.tensor([row.index for row in rows])
    device, width = scores.logprobs.device, scores.mask.shape[1]
    advantages = signal.advantages[index]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages[:, :width]
    robust = None if robust_weights is None else robust_weights[index]
    weights = token_weights[index] if robust is None else token_weights[index] * robust
    counted = signal.counted_lengths[index][:, None] > 0
    returns = signal.returns
    teacher = [row.teacher_states for row in rows if row.teacher_states is not None]
    return MicroSignal(
        advantages=advantages.to(device),
        weights=(weights[:, None] * counted).to(device) * scores.mask,
        old_logprobs=_padded([_ratio_base(row) for row in rows], scores),
        ref_logprobs=_padded([row.ref_logprobs for row in rows], scores),
        old_values=_padded([row.old_values for row in rows], scores),
        returns=None if returns is None else returns[index][:, :width].to(device),
        teacher_states=torch.cat(teacher) if teacher else None,
        row_weights=None if robust is None else robust.to(device),
        importance=_importance(rows, scores, importance_cap),
    )


def _importance(rows: Sequence[Row], scores: TokenScores, cap: float | None) -> Importance | None:
    """The correction of rows whose ratio is not taken against what drew them."""
    if cap is None or any(row.sampling_logprobs is not None for row in rows):
        return None
    drawn = sampling_logprobs(rows, scores)
    return None if drawn is None else Importance(drawn, cap)


def sampling_logprobs(rows: Sequence[Row], scores: TokenScores) -> Tensor | None:
    """[b, T] as the engine gave them; None for completions that no engine drew."""
    if not all(row.completion.sampling_logprobs for row in rows):
        return None
    return _padded([_drawn_with(row.completion) for row in rows], scores)


def _drawn_with(completion: Completion) -> Tensor:
    return torch.tensor(completion.sampling_logprobs, dtype=torch.float64)


def _ratio_base(row: Row) -> Tensor | None:
    return row.old_logprobs if row.sampling_logprobs is None else row.sampling_logprobs


def remember(rows: Sequence[Row], name: str, values: Tensor) -> None:
    """Keep per-token values [b, T], without padding, as a field of each row."""
    for row, own in zip(rows, values.detach(), strict=True):
        setattr(row, name, own[: len(row.completion.token_ids)].clone())


def remember_states(rows: Sequence[Row], states: Tensor) -> None:
    """Keep the teacher's states [M, d], cut into rows."""
    lengths = [len(row.completion.token_ids) for row in rows]
    for row, own in zip(rows, states.detach().split(lengths), strict=True):
        row.teacher_states = own.clone()


def _padded(rows: Sequence[Tensor | None], scores: TokenScores) -> Tensor | None:
    """Ragged rows as [b, T] beside `scores`; None when they are not known yet."""
    out = torch.zeros_like(scores.logprobs)
    for place, row in enumerate(rows):
        if row is None:
            return None
        out[place, : row.shape[0]] = row
    return out


def _stack(rows: Sequence[Tensor | None], width: int) -> Tensor | None:
    """Ragged rows as [B, width] on the CPU; None when they are not known."""
    known = [row for row in rows if row is not None]
    if len(known) < len(rows):
        return None
    out = known[0].new_zeros(len(known), width, device="cpu")
    for place, row in enumerate(known):
        out[place, : row.shape[0]] = row
    return out
