"""Successive halving against a slow version, on scores that are made by hand or drawn."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlprompt.prompts.text import TextPrompt
from rlprompt.search.base import SearchStart, Trial
from rlprompt.search.texts import Texts, TextsSettings
from tests.fixtures.searches import trial

Score = Callable[[int], float]
"""Number of a text -> a score of one completion."""


def texts(count: int) -> list[str]:
    return [f"text {number}" for number in range(count)]


def step(race: Texts, score: Score, size: int = 3) -> list[int]:
    """One step of `size` queries with one completion; gives the numbers that were asked for."""
    asked = race.ask()
    race.tell([trial(c, [[score(c.id)] for _ in range(size)]) for c in asked])
    return [candidate.id for candidate in asked]


def slow_halving(means: Sequence[float], keep: float, each: int, size: int) -> list[list[int]]:
    """Which texts every step tries, where a text's score is always its mean."""
    left, steps = list(range(len(means))), []
    while len(left) > 1:
        wanted = each * len(means) / len(left)
        drawn = 0
        while drawn < wanted:
            steps.append(list(left))
            drawn += size
        best_first = sorted(left, key=lambda i: means[i], reverse=True)
        count = int(keep * len(left))
        left = [i for i in left if i in best_first[: count if count else 1]]
    return steps


@pytest.mark.parametrize("keep", [0.5, 0.3, 0.9])
@pytest.mark.parametrize("count", [2, 5, 11])
@pytest.mark.parametrize("each", [1, 7])
def test_every_round_drops_the_worse_part(keep: float, count: int, each: int) -> None:
    means = random.Random(count).sample(range(100), count)
    race = Texts(texts(count), keep, each)
    tried = []
    while not race.is_over:
        tried.append(step(race, lambda number: means[number]))
    assert tried == slow_halving(means, keep, each, size=3)
    assert race.incumbent.id == means.index(max(means))
    assert race.incumbent.prompt.init_text == f"text {race.incumbent.id}"


def test_rounds_cost_the_same() -> None:
    race = Texts(texts(8), 0.5, 12)
    calls: dict[int, int] = {}
    while not race.is_over:
        asked = step(race, float)
        calls[len(asked)] = calls.get(len(asked), 0) + 3 * len(asked)
    assert calls == {8: 96, 4: 96, 2: 96}


def bandit(seed: int) -> tuple[int, Score]:
    """The good one of ten Bernoulli arms, and what a text's completion scores."""
    draw = random.Random(seed)
    good = draw.randrange(10)
    return good, lambda number: float(draw.random() < 0.4 + 0.3 * (number == good))


def test_the_best_of_noisy_texts_is_found() -> None:
    """Chance alone would find it in one of ten searches."""
    found = 0
    for seed in range(20):
        good, score = bandit(seed)
        race = Texts(texts(10), 0.5, 24)
        while not race.is_over:
            step(race, score)
        found += race.incumbent.id == good
    assert found >= 18


def test_ties_keep_the_earlier_text_and_the_start_is_believed_in_first() -> None:
    race = Texts(texts(4), 0.5, 1)
    assert race.incumbent.id == 0
    assert step(race, lambda number: 0.5) == [0, 1, 2, 3]
    assert step(race, lambda number: 0.5) == [0, 1]
    assert race.is_over and race.incumbent.id == 0


def test_a_text_without_a_score_is_last_and_nothing_is_dropped_on_no_score_at_all() -> None:
    race = Texts(texts(3), 0.5, 1)
    for _ in range(4):
        assert step(race, lambda number: math.nan) == [0, 1, 2]
    assert race.incumbent.id == 0
    assert step(race, lambda number: -1.0 if number == 1 else math.nan) == [0, 1, 2]
    assert race.is_over and race.incumbent.id == 1


def test_a_restored_race_is_the_one_that_went_on() -> None:
    noise = [random.Random(3).random() for _ in range(1000)]

    def run(race: Texts, numbers: list[float], steps: int) -> list[list[int]]:
        drawn = iter(numbers)
        return [step(race, lambda number: next(drawn) + number) for _ in range(steps)]

    race = Texts(texts(6), 0.5, 4)
    run(race, noise, 3)
    kept = race.state()
    after = run(race, noise[100:], 4)
    again = Texts(texts(6), 0.5, 4)
    again.restore(kept)
    assert run(again, noise[100:], 4) == after
    assert again.incumbent.id == race.incumbent.id
    assert all(torch.equal(again.state().tensors[k], v) for k, v in race.state().tensors.items())
    assert again.state().plain == race.state().plain
    with pytest.raises(ValueError, match="between other texts"):
        Texts(texts(5), 0.5, 4).restore(kept)


def test_the_text_of_the_prompt_takes_part_once() -> None:
    def made(*texts: str) -> list[str]:
        start = SearchStart(TextPrompt("start"), 0)
        race = Texts.make(TextsSettings(texts=texts), start)
        return [candidate.prompt.init_text for candidate in race.ask()]

    assert made("a", "b") == ["start", "a", "b"]
    assert made("a", "start") == ["start", "a"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"texts": ["a"]}, "at least 2"),
        ({"texts": ["a", " "]}, "text 1 is blank"),
        ({"texts": ["a", "b", "a"]}, "text 2 is there twice"),
        ({"texts": ["a", "b"], "keep": 1.0}, "less than 1"),
        ({"texts": ["a", "b"], "completions": 0}, "greater than or equal to 1"),
        ({"texts": ["a", "b"], "completions_per_query": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_race_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        TextsSettings(**settings)


def test_completions_of_several_per_query_all_count() -> None:
    race = Texts(texts(2), 0.5, 4)
    asked = race.ask()
    told: list[Trial] = [trial(c, [[0.0, 1.0 + c.id], [0.0, 0.0]]) for c in asked]
    race.tell(told)
    assert race.is_over and race.incumbent.id == 1
