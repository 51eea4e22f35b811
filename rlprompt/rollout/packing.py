"""Cutting a rollout batch into micro-batches of bounded token count.

Linear layers see packed tokens and pay no padding; attention pads completions to the longest of
their micro-batch. Rows are therefore laid out by length, so that neighbours are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatch:
    """Some completions of some groups."""

    rows: tuple[tuple[int, tuple[int, ...]], ...]
    """(group, completions of that group), each completion in exactly one micro-batch."""
    num_tokens: int
    """Packed tokens of the forward: queries once per group, completions without their last."""


def pack(
    query_lengths: Sequence[int],
    completion_lengths: Sequence[Sequence[int]],
    token_budget: int,
    whole_groups: bool = False,
) -> list[MicroBatch]:
    """Micro-batches of at most `token_budget` packed tokens.

    A group stays together where it fits, so that its query is computed once; one that does not is
    cut into runs of completions of like length. A single completion over the budget gets a
    micro-batch of its own.

    Args:
        query_lengths: the tokens of each group's query.
        completion_lengths: the tokens of each completion, per group, at least 1 each.
        token_budget: the most tokens of a micro-batch, which bounds activation memory.
        whole_groups: whether a group is never cut; one over the budget then gets a micro-batch of
            its own.
    """
    pieces: list[tuple[int, int, tuple[int, ...], int]] = []
    for group, (query, lengths) in enumerate(zip(query_lengths, completion_lengths, strict=True)):
        pieces += [
            (max(lengths[i] for i in chosen), group, chosen, tokens)
            for chosen, tokens in _cut(query, lengths, token_budget, whole_groups)
        ]
    pieces.sort()
    batches: list[MicroBatch] = []
    rows: list[tuple[int, tuple[int, ...]]] = []
    total = 0
    for _, group, chosen, tokens in pieces:
        if rows and total + tokens > token_budget:
            batches.append(MicroBatch(tuple(rows), total))
            rows, total = [], 0
        rows.append((group, chosen))
        total += tokens
    if rows:
        batches.append(MicroBatch(tuple(rows), total))
    return batches


def _cut(
    query: int, lengths: Sequence[int], budget: int, keep_whole: bool
) -> list[tuple[tuple[int, ...], int]]:
    """One group as runs of completions that fit the budget, with their token counts."""
    whole = query + sum(lengths) - len(lengths)
    if whole <= budget or keep_whole:
        return [(tuple(range(len(lengths))), whole)]
    runs: list[tuple[tuple[int, ...], int]] = []
    chosen: list[int] = []
    total = query
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        tokens = lengths[i] - 1
        if chosen and total + tokens > budget:
            runs.append((tuple(chosen), total))
            chosen, total = [], query
        chosen.append(i)
        total += tokens
    runs.append((tuple(chosen), total))
    return runs
