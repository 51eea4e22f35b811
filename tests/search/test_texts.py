"""Successive halving against a slow version, on scores that are made by hand or drawn."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlprompt.errors import InputError
from rlprompt.prompts.text import TextPrompt
from rlprompt.runs.learner import LearnerState
from rlprompt.search.base import Candidate, SearchStart, Trial
from rlprompt.search.evidence import EvidenceSettings
from rlprompt.search.texts import Texts, TextsSettings
from tests.fixtures.searches import trial

Score = Callable[[int], float]
"""Number of a text -> a score of one completion."""


def texts(count: int) -> list[str]:
    return [f"text {number}" for number in range(count)]


def weigh(race: Texts, means: Sequence[float], seed: int, most: int = 400) -> int:
    """Scores of 0 or 1 with these means, five new queries a step; gives the steps it took."""
    draw = random.Random(seed)
    for number in range(most):
        if race.is_over:
            return number
        asked = race.ask()
        race.tell([coins(c, means[c.id], 5 * number, draw) for c in asked])
    return most


def coins(candidate: Candidate, mean: float, first: int, draw: random.Random) -> Trial:
    """Five queries numbered from `first`, one completion each, of which `mean` score 1."""
    told = trial(candidate, [[float(draw.random() < mean)] for _ in range(5)])
    groups = [
        replace(group, query=replace(group.query, index=first + place))
        for place, group in enumerate(told.groups)
    ]
    return replace(told, groups=tuple(groups))


def by_evidence(count: int, **evidence: Any) -> Texts:
    given = texts(count)
    settings = TextsSettings(texts=tuple(given[1:]), evidence=EvidenceSettings(**evidence))
    return Texts.make(settings, SearchStart(TextPrompt(given[0]), 0))


def test_by_evidence_a_better_text_replaces_the_start() -> None:
    found = 0
    for seed in range(10):
        race = by_evidence(4, min_effect=0.2, spread=1.0)
        assert race.incumbent.id == 0
        weigh(race, [0.4, 0.4, 0.8, 0.4], seed)
        found += race.is_over and race.incumbent.id == 2
    assert found >= 8


def test_by_evidence_equal_texts_leave_the_start_where_halving_names_a_winner() -> None:
    kept = halved = 0
    for seed in range(20):
        race = by_evidence(4, min_effect=0.3)
        weigh(race, [0.5] * 4, seed)
        kept += race.incumbent.id == 0
        halving = Texts(texts(4), 0.5, 24)
        weigh(halving, [0.5] * 4, seed)
        halved += halving.incumbent.id == 0
    assert kept >= 18 and halved <= 12


def test_by_evidence_is_the_default_and_either_setting_of_halving_asks_for_halving() -> None:
    start = SearchStart(TextPrompt("start"), 0)

    def is_by_evidence(**settings: Any) -> bool:
        made = Texts.make(TextsSettings(texts=("a", "b"), **settings), start)
        return "race" in made.state().plain

    assert is_by_evidence() and is_by_evidence(evidence={})
    assert not is_by_evidence(keep=0.3) and not is_by_evidence(completions=3)


def test_by_evidence_queries_that_come_again_end_the_search() -> None:
    race = by_evidence(3)
    asked = race.ask()
    for is_over in (False, True):
        race.tell([trial(c, [[0.5], [0.5]]) for c in asked])
        assert race.is_over is is_over
    assert race.incumbent.id == 0 and len(race.ask()) == 3


def test_by_evidence_a_restored_search_is_the_one_that_went_on() -> None:
    means = [0.4, 0.7, 0.3, 0.5]
    race, again = by_evidence(4, min_effect=0.2), by_evidence(4, min_effect=0.2)
    weigh(race, means, 1, most=6)
    state = race.state()
    again.restore(LearnerState(state.tensors, json.loads(json.dumps(dict(state.plain)))))
    draw = [random.Random(2), random.Random(2)]
    for number in range(10, 40):
        for each, chance in zip((race, again), draw, strict=True):
            each.tell([coins(c, means[c.id], 5 * number, chance) for c in each.ask()])
    assert race.state().plain == again.state().plain
    assert race.incumbent.id == again.incumbent.id
    with pytest.raises(ValueError, match="by another rule"):
        Texts(texts(4)).restore(state)
    with pytest.raises(ValueError, match="by another rule"):
        by_evidence(4).restore(Texts(texts(4)).state())


def test_by_evidence_rewards_beyond_the_stated_spread_end_the_run() -> None:
    race = by_evidence(2 + 1, spread=1.0)
    with pytest.raises(
        InputError, match=r"search\.evidence\.spread does not hold: a difference is"
    ):
        race.tell([trial(c, [[3.0 * c.id]]) for c in race.ask()])


def test_by_evidence_what_cannot_be_scored_drops_nobody() -> None:
    race = by_evidence(3)
    race.tell([trial(c, [[math.nan], [math.nan]]) for c in race.ask()])
    assert len(race.ask()) == 3 and race.incumbent.id == 0


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
        ({"texts": ["a", "b"], "evidence": {}, "keep": 0.5}, "keep is for halving"),
        ({"texts": ["a", "b"], "evidence": {}, "completions": 5}, "completions is for halving"),
        ({"texts": ["a", "b"], "evidence": {"alpha": 1.0}}, "less than 1"),
        ({"texts": ["a", "b"], "evidence": {"spread": 0.0}}, "greater than 0"),
        ({"texts": ["a", "b"], "evidence": {"min_effect": 1.0}}, "choose it below 1"),
        (
            {"texts": ["a", "b"], "evidence": {"spread": 0.5, "min_effect": 0.5}},
            "below the spread, 0.5",
        ),
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
