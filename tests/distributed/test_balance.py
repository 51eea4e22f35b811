"""Which rank learns from what: everything once, whole groups while they last, evenly."""

from __future__ import annotations

import random
from itertools import product

import pytest

from rlprompt.distributed.balance import owners
from rlprompt.distributed.ranks import Ranks


@pytest.mark.parametrize(("count", "num_ranks"), [(8, 2), (9, 4), (16, 16), (7, 3)])
def test_whole_groups_go_to_the_rank_with_the_fewest_tokens(count: int, num_ranks: int) -> None:
    draw = random.Random(count)
    queries = [draw.randint(5, 20) for _ in range(count)]
    lengths = [[draw.randint(1, 90) for _ in range(4)] for _ in range(count)]
    found = owners(queries, lengths, num_ranks)
    assert [len(each) for each in found] == [4] * count
    assert all(len(set(each)) == 1 for each in found)
    tokens = [query + sum(own) for query, own in zip(queries, lengths, strict=True)]
    loads = [0] * num_ranks
    for own, size in zip(found, tokens, strict=True):
        loads[own[0]] += size
    assert all(loads)
    # The rank that ends last was the emptiest before its last group came.
    assert max(loads) <= sum(tokens) / num_ranks + max(tokens)
    plain = [sum(tokens[rank::num_ranks]) for rank in range(num_ranks)]
    assert max(loads) <= max(plain)
    assert owners(queries, lengths, num_ranks) == found


def test_longest_first_by_hand() -> None:
    # 9 to rank 0, 7 to rank 1, 6 to rank 1, 5 to rank 0: 14 and 13.
    assert owners([1, 1, 1, 1], [[5], [8], [6], [4]], 2) == [[1], [0], [1], [0]]
    # Of equal groups the first goes to the first rank.
    assert owners([1] * 4, [[2]] * 4, 2) == [[0], [1], [0], [1]]


@pytest.mark.parametrize(("count", "size", "num_ranks"), [(8, 8, 16), (2, 4, 3), (3, 2, 6)])
def test_fewer_groups_than_ranks_are_cut_into_runs(count: int, size: int, num_ranks: int) -> None:
    even = owners([9] * count, [[7] * size] * count, num_ranks)
    flat = [rank for own in even for rank in own]
    assert flat == sorted(flat) and set(flat) == set(range(num_ranks))
    shares = [flat.count(rank) for rank in range(num_ranks)]
    assert max(shares) - min(shares) <= 1


def test_runs_have_like_tokens() -> None:
    # 12 of 24 tokens lie in the first completion, the others have 2 each.
    assert owners([3, 3], [[12, 2, 2], [2, 2, 2, 2]], 3) == [[0, 1, 1], [1, 2, 2, 2]]
    # Whatever one completion takes, the others have something to do.
    assert owners([3], [[20, 1, 1, 1, 1]], 3) == [[0, 1, 1, 2, 2]]
    assert owners([3], [[1, 1, 1, 50]], 4) == [[0, 1, 2, 3]]
    assert owners([3], [[1, 1]], 4) == [[0, 1]]
    assert owners([3, 3], [[1, 1], [1, 1]], 3, whole_groups=True) == [[0, 0], [1, 1]]


def test_pieces_of_groups_are_disjoint_whole_and_even() -> None:
    for num_ranks, groups, size in product(range(2, 20), range(1, 19), (1, 2, 3, 8)):
        if groups >= num_ranks:
            continue
        pieces = [Ranks(rank, num_ranks).piece(groups, size) for rank in range(num_ranks)]
        drawn = [(group, i) for group, own in pieces for i in own]
        assert drawn == [(group, i) for group in range(groups) for i in range(size)]
        most = -(-size // (num_ranks // groups))
        assert max(len(own) for _, own in pieces) <= most
