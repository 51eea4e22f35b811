"""QuerySampler: without replacement, no duplicates in a batch, exact resume."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from rlprompt.data import QuerySampler
from rlprompt.errors import InputError


@pytest.mark.parametrize(("num_queries", "batch_size"), [(10, 3), (7, 7), (5, 4), (1, 1), (64, 8)])
def test_every_epoch_draws_every_query_once(num_queries: int, batch_size: int) -> None:
    sampler = QuerySampler(num_queries, batch_size, seed=0)
    drawn = [number for _ in range(num_queries * 3) for number in sampler.next()]
    for start in range(0, len(drawn), num_queries):
        assert sorted(drawn[start : start + num_queries]) == list(range(num_queries))


@pytest.mark.parametrize(("num_queries", "batch_size"), [(10, 3), (7, 6), (5, 4), (9, 9)])
def test_no_batch_holds_a_query_twice_across_epochs(num_queries: int, batch_size: int) -> None:
    sampler = QuerySampler(num_queries, batch_size, seed=1)
    for _ in range(100):
        batch = sampler.next()
        assert len(batch) == batch_size
        assert len(set(batch)) == batch_size


def test_batch_larger_than_dataset_repeats_evenly() -> None:
    batch = QuerySampler(num_queries=3, batch_size=8, seed=0).next()
    assert sorted(Counter(batch).values()) == [2, 3, 3]


def test_epochs_differ_and_seed_decides() -> None:
    first, again, other = (QuerySampler(50, 50, seed) for seed in (0, 0, 1))
    epochs = [first.next(), first.next()]
    assert epochs[0] != epochs[1]
    assert epochs == [again.next(), again.next()]
    assert other.next() != epochs[0]


@pytest.mark.parametrize("num_before", [0, 1, 2, 3, 7, 20])
def test_resumed_equals_uninterrupted(num_before: int) -> None:
    whole = QuerySampler(10, 4, seed=3)
    expected = [whole.next() for _ in range(num_before + 30)][num_before:]
    interrupted = QuerySampler(10, 4, seed=3)
    for _ in range(num_before):
        interrupted.next()
    state = json.loads(json.dumps(interrupted.state_dict()))
    interrupted.next()
    resumed = QuerySampler(10, 4, seed=3)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert [resumed.next() for _ in range(30)] == expected


def test_state_is_a_copy() -> None:
    sampler = QuerySampler(10, 4, seed=3)
    sampler.next()
    state = sampler.state_dict()
    before = json.dumps(state)
    sampler.next()
    assert json.dumps(state) == before


def test_epoch_counts_the_fraction_drawn() -> None:
    sampler = QuerySampler(num_queries=8, batch_size=2, seed=0)
    epochs = [sampler.epoch]
    for _ in range(5):
        sampler.next()
        epochs.append(sampler.epoch)
    assert epochs == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (QuerySampler(11, 4, 3), "num_queries 11"),
        (QuerySampler(10, 5, 3), "batch_size 5"),
        (QuerySampler(10, 4, 2), "seed 2"),
    ],
)
def test_state_of_another_sampler_is_refused(other: QuerySampler, name: str) -> None:
    with pytest.raises(InputError, match=name):
        QuerySampler(10, 4, seed=3).load_state_dict(other.state_dict())


@pytest.mark.parametrize(("num_queries", "batch_size"), [(0, 4), (4, 0)])
def test_empty_dataset_or_batch_is_refused(num_queries: int, batch_size: int) -> None:
    with pytest.raises(InputError, match="needs at least 1"):
        QuerySampler(num_queries, batch_size, seed=0)
