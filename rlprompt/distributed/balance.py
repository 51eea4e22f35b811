"""Which rank learns from which completion, so that all have about as many tokens.

Pure and the same on every rank, since all know all lengths. Groups stay whole where there are as
many as ranks, because a query is then computed once: the longest goes first, to the rank with the
fewest tokens so far (LPT; Graham 1969: at most 4/3 of the least possible maximum). Of fewer groups
the completions lie in a row, which is cut into runs of like tokens, one per rank.
"""

from __future__ import annotations

from collections.abc import Sequence


def owners(
    query_lengths: Sequence[int],
    completion_lengths: Sequence[Sequence[int]],
    num_ranks: int,
    whole_groups: bool = False,
) -> list[list[int]]:
    """The rank of each completion, per group.

    Args:
        query_lengths: the tokens of each group's query.
        completion_lengths: the tokens of each completion, per group.
        num_ranks: the number of ranks.
        whole_groups: whether a group is never cut; of more ranks than groups some get nothing.
    """
    if len(query_lengths) < num_ranks and not whole_groups:
        return _runs(completion_lengths, num_ranks)
    tokens = [
        query + sum(lengths)
        for query, lengths in zip(query_lengths, completion_lengths, strict=True)
    ]
    loads = [0] * num_ranks
    found = [0] * len(tokens)
    for group in sorted(range(len(tokens)), key=lambda g: (-tokens[g], g)):
        found[group] = min(range(num_ranks), key=lambda rank: (loads[rank], rank))
        loads[found[group]] += tokens[group]
    return [[rank] * len(lengths) for rank, lengths in zip(found, completion_lengths, strict=True)]


def _runs(completion_lengths: Sequence[Sequence[int]], num_ranks: int) -> list[list[int]]:
    """Runs of completions: each rank takes its share of the tokens that those before have left.

    A completion whose middle lies beyond the share is the next rank's. Nobody is left without one
    while there are enough.
    """
    left, rows_left = sum(map(sum, completion_lengths)), sum(map(len, completion_lengths))
    rank, load, among = 0, 0, num_ranks
    found: list[list[int]] = []
    for lengths in completion_lengths:
        found.append([])
        for length in lengths:
            is_full = (2 * load + length) * among > 2 * left or rows_left < among
            if load and among > 1 and is_full:
                rank, left, load, among = rank + 1, left - load, 0, among - 1
            found[-1].append(rank)
            load += length
            rows_left -= 1
    return found
