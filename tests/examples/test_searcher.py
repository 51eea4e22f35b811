"""examples/extend/searcher.py: it climbs to the best text, and resumes where it stood."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest

from examples.extend.searcher import Climb, ClimbSettings
from rlprompt.prompts.text import TextPrompt
from rlprompt.runs.learner import LearnerState
from rlprompt.search.base import SearchStart
from tests.fixtures.searches import trial

PHRASES = (("a", "b"), ("c",), ("d", "e", "f"))


def climb(seed: int) -> Climb:
    settings = ClimbSettings(type="searcher.py:Climb", phrases=PHRASES)
    return Climb.make(settings, SearchStart(TextPrompt("start"), seed))


def value_of(seed: int) -> dict[str, float]:
    """What each text is worth: drawn for every phrase, and summed up."""
    draw = random.Random(seed)
    worth = {phrase: draw.uniform(-1, 1) for phrase in itertools.chain(*PHRASES)}
    texts = itertools.product(*[["", *phrases] for phrases in PHRASES])
    return {
        " ".join(["start", *filter(None, chosen)]): sum(worth.get(phrase, 0) for phrase in chosen)
        for chosen in texts
    }


def step(searcher: Climb, values: dict[str, float], noise: random.Random) -> list[str]:
    """Two queries; what is hard for one candidate is as hard for the other."""
    hard = [noise.gauss(0, 10) for _ in range(2)]
    asked = searcher.ask()
    texts = [candidate.prompt.init_text for candidate in asked]
    searcher.tell(
        [trial(c, [[values[t] + h] for h in hard]) for c, t in zip(asked, texts, strict=True)]
    )
    return texts


@pytest.mark.parametrize("seed", range(10))
def test_the_best_of_all_texts_is_found_although_queries_differ_in_difficulty(seed: int) -> None:
    values, searcher = value_of(seed), climb(seed)
    tried = [
        step(searcher, values, random.Random(seed)) for _ in range(100) if not searcher.is_over
    ]
    assert searcher.is_over
    assert values[searcher.incumbent.prompt.init_text] == max(values.values())
    assert len(tried) < 40
    assert tried[0][0] == "start"


def test_a_resumed_climb_is_the_uninterrupted_one() -> None:
    values = value_of(3)
    searcher = climb(3)
    for _ in range(3):
        step(searcher, values, random.Random(0))
    kept = searcher.state()
    straight = [step(searcher, values, random.Random(0)) for _ in range(3)]
    again = climb(3)
    again.restore(LearnerState({}, json.loads(json.dumps(kept.plain))))
    assert [step(again, values, random.Random(0)) for _ in range(3)] == straight
    assert again.state().plain == searcher.state().plain
    assert again.incumbent.id == searcher.incumbent.id


def test_a_neighbour_that_nothing_could_score_is_refused() -> None:
    searcher = climb(0)
    searcher.tell([trial(c, [[math.nan]]) for c in searcher.ask()])
    assert searcher.incumbent.id == 0 and not searcher.is_over
