"""Fitness and test queries: disjoint, all of them, each in an order of its own."""

from __future__ import annotations

from collections import Counter

import pytest

from rlprompt.errors import InputError
from rlprompt.prompts.text import TextPrompt
from rlprompt.search.base import SearchStart
from rlprompt.search.division import Division
from tests.fixtures.evolving import made_up


def division(count: int, share: float = 0.5, per_step: int = 3, seed: int = 0) -> Division:
    given = SearchStart(TextPrompt("a"), seed, queries=made_up(count), queries_per_step=per_step)
    return Division.of(given, share)


def indices(queries: object) -> list[int]:
    assert isinstance(queries, tuple)
    return [query.index for query in queries]


def test_parts_are_disjoint_and_everything() -> None:
    made = division(20, 0.3)
    tests: list[int] = []
    while found := made.tests(tests):
        tests += indices(found)
    fitness = {index for step in range(5) for index in indices(made.fitness(step))}
    assert len(tests) == 6 and len(set(tests)) == 6
    assert fitness | set(tests) == set(range(20)) and not fitness & set(tests)


def test_fitness_queries_come_equally_often() -> None:
    made = division(20)
    met = Counter(index for step in range(20) for index in indices(made.fitness(step)))
    assert set(met.values()) == {6}


def test_a_step_has_each_query_once() -> None:
    made = division(9, per_step=4)
    for step in range(20):
        found = indices(made.fitness(step))
        assert len(set(found)) == len(found) >= 1
    assert len(indices(division(4, per_step=50).fitness(0))) == 2


def test_other_seeds_divide_in_another_way() -> None:
    assert len({tuple(indices(division(40, seed=seed).tests(()))) for seed in range(5)}) > 1
    assert indices(division(40).tests(())) == indices(division(40).tests(()))


def test_few_queries_are_refused_and_none_are_left_to_the_driver() -> None:
    with pytest.raises(InputError, match=r"only 3 of 4 .* search\.evidence to null"):
        division(3)
    assert indices(division(4, 0.01).tests(())) and indices(division(4, 0.99).fitness(0))
    for nothing in (division(0), division(3, 0.0)):
        assert nothing.fitness(0) is None and nothing.tests(()) is None
