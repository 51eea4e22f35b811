"""Micro-batches hold every completion once and keep to the budget."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from rlprompt.rollout.packing import pack


def packed_tokens(
    queries: list[int], lengths: list[list[int]], rows: tuple[tuple[int, tuple[int, ...]], ...]
) -> int:
    return sum(queries[g] + sum(lengths[g][i] - 1 for i in places) for g, places in rows)


@pytest.mark.parametrize("seed", range(60))
def test_every_completion_once_within_the_budget(seed: int) -> None:
    generator = random.Random(seed)
    groups = generator.randint(1, 7)
    queries = [generator.randint(1, 40) for _ in range(groups)]
    lengths = [
        [generator.randint(1, 60) for _ in range(generator.randint(1, 9))] for _ in range(groups)
    ]
    budget = generator.choice([1, 20, 64, 200, 100_000])
    batches = pack(queries, lengths, budget)
    seen = Counter((g, i) for batch in batches for g, places in batch.rows for i in places)
    assert seen == Counter((g, i) for g, row in enumerate(lengths) for i in range(len(row)))
    for batch in batches:
        assert batch.num_tokens == packed_tokens(queries, lengths, batch.rows)
        single = len(batch.rows) == 1 and len(batch.rows[0][1]) == 1
        assert batch.num_tokens <= budget or single
        assert batch.rows and all(places for _, places in batch.rows)


def test_one_micro_batch_when_everything_fits() -> None:
    (batch,) = pack([3, 5], [[2, 2], [9, 1]], 3 + 5 + 1 + 1 + 8 + 0)
    assert sorted(batch.rows) == [(0, (0, 1)), (1, (0, 1))]
    assert batch.num_tokens == 18


def test_a_group_is_cut_only_where_it_must_be() -> None:
    batches = pack([10, 10], [[5, 5, 5], [50, 50, 50]], 60)
    cuts = Counter(g for batch in batches for g, _ in batch.rows)
    assert cuts == {0: 1, 1: 3}


def test_alike_lengths_share_a_micro_batch() -> None:
    lengths = [[40] * 3, [2] * 3, [41] * 3, [3] * 3]
    batches = pack([1] * 4, lengths, 249)
    assert [[g for g, _ in batch.rows] for batch in batches] == [[1, 3, 0], [2]]


def test_no_groups_make_no_micro_batches() -> None:
    assert pack([], [], 64) == []
