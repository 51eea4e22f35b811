"""Which tokens see which: the rows of a packed batch, as the prefix-attention kernels read them.

Letters: N packed tokens, R rows, G groups, B completions, P prefix tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
"""A larger head does not fit the kernels' tiles."""

COLUMNS = ("first", "end", "parent_first", "parent_end", "child_first", "child_end")


@dataclass(frozen=True)
class AttentionRows:
    """R rows of N packed tokens under one prefix.

    A row's tokens see the prefix, all tokens of the row's parent (a completion's parent is its
    group's query), and their own row causally. All tokens of a row's children must stand behind
    each other, so that they are one range.
    """

    table: Tensor
    """int32 [R, 6], half-open ranges of packed tokens; see `COLUMNS`. An empty range is absent."""
    positions: Tensor
    """int32 [N], counted from the start of the prefix; sliding windows use them."""
    max_length: int
    """No row has more own tokens than this."""


def attention_rows(
    query_lengths: Tensor,
    completion_lengths: Tensor | None,
    group_of_row: Tensor,
    positions: Tensor,
    max_length: int,
) -> AttentionRows:
    """Rows of packed queries followed by packed completions, without waiting for the device.

    Args:
        query_lengths: int [G].
        completion_lengths: int [B]; None = queries only.
        group_of_row: int64 [B], ascending: completions of a group stand behind each other.
        positions: int [N].
        max_length: an upper bound of all lengths.
    """
    query_ends = torch.cumsum(query_lengths, 0)
    query_firsts = query_ends - query_lengths
    none = torch.zeros_like(query_ends)
    if completion_lengths is None:
        table = torch.stack([query_firsts, query_ends, none, none, none, none], dim=1)
        return AttentionRows(table.int(), positions.int(), max_length)
    total = query_ends[-1]
    ends = torch.cumsum(completion_lengths, 0) + total
    firsts = ends - completion_lengths
    places = torch.arange(query_lengths.shape[0], device=query_lengths.device)
    # The tokens of group g's completions end where those of all groups up to g end.
    up_to = (group_of_row[None] <= places[:, None]) * completion_lengths[None]
    child_ends = up_to.sum(1) + total
    child_firsts = torch.cat([total[None], child_ends[:-1]])
    parents = (query_firsts[group_of_row], query_ends[group_of_row])
    no_child = torch.zeros_like(ends)
    table = torch.cat(
        [
            torch.stack([query_firsts, query_ends, none, none, child_firsts, child_ends], dim=1),
            torch.stack([firsts, ends, *parents, no_child, no_child], dim=1),
        ]
    )
    return AttentionRows(table.int(), positions.int(), max_length)
