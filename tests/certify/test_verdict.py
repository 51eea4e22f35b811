"""The verdict never is kinder than the numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlprompt.certify.comparison import Scores
from rlprompt.certify.verdict import judge, unmeasured


def scores(**means: float) -> dict[str, Scores]:
    """Twenty queries with a little noise of their own for everybody."""
    return {
        who: mean + np.random.default_rng(place).normal(scale=0.05, size=(20, 2))
        for place, (who, mean) in enumerate(means.items())
    }


def test_better_than_all() -> None:
    verdict = judge(scores(base=0.2, handwritten=0.3, start=0.3, learned=0.8), split="test")
    assert verdict.learned is True and verdict.mood == "good"
    assert verdict.sentence.startswith("Better than the hand-written text by 0.5")
    assert "better than the base without a system prompt by 0.6" in verdict.sentence
    assert verdict.sentence.endswith("(95% intervals, n = 20 test queries).")


def test_bad_news_come_first() -> None:
    """Above the base, below the text that a person wrote: no success."""
    verdict = judge(scores(base=0.2, handwritten=0.8, start=0.3, learned=0.5), split="test")
    assert verdict.sentence.startswith("Worse than the hand-written text by 0.3")
    assert verdict.learned is True and verdict.mood == "bad"


def test_what_kept_its_start_has_learned_nothing() -> None:
    values = scores(base=0.2, handwritten=0.8, learned=0.5)
    verdict = judge({**values, "start": values["learned"]}, split="validation", kept_start=True)
    assert verdict.learned is False and verdict.mood == "bad"
    assert verdict.sentence.startswith("Nothing was learned: no later prompt did better")
    assert "Worse than the hand-written text" in verdict.sentence
    assert "the prompt it began with by" not in verdict.sentence


def test_no_difference_is_no_success() -> None:
    verdict = judge(scores(start=0.5, learned=0.5), split="test")
    assert verdict.learned is False and verdict.mood == "bad"
    assert verdict.sentence.startswith("Not shown to be better than the prompt it began with: ")


def test_selection_on_the_same_queries_is_said_and_allowed_for() -> None:
    values = scores(start=0.50, learned=0.54)
    alone = judge(values, split="validation")
    among = judge(values, split="validation", num_compared=500)
    assert "that also chose it among 500 prompts" in among.sentence
    first, second = (each.differences["start"].interval for each in (alone, among))
    assert second.high - second.low > 1.3 * (first.high - first.low)


def test_rewards_that_teach_nothing_are_said_whatever_the_numbers() -> None:
    why = "every completion got one and the same reward in all 30 steps"
    verdict = judge(scores(start=0.2, learned=0.8), split="test", without_signal=why)
    assert verdict.learned is False and verdict.mood == "bad"
    assert verdict.sentence.startswith(f"Nothing was learned, because {why}.")
    assert unmeasured("no query was held out", why).learned is False
    assert unmeasured("no query was held out").learned is None


def test_values_that_are_all_unknown_are_no_measurement() -> None:
    verdict = judge({"learned": np.full((4, 2), np.nan)}, split="test")
    assert verdict.learned is None
    assert verdict.sentence.startswith("Nothing says whether anything was learned")


@pytest.mark.parametrize("count", [1, 20])
def test_a_verdict_is_json(count: int) -> None:
    values = {who: each[:count] for who, each in scores(base=0.2, learned=0.8).items()}
    plain = judge(values, split="test").plain()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
