"""Flags: raised by what is unusual, and by nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from rlprompt.interpret.anomalies import of_positions, of_queries, of_vectors, robust_z
from rlprompt.interpret.clock import Clock, Slice
from rlprompt.interpret.nearest import nearest, verdict
from rlprompt.interpret.words import percent
from rlprompt.prompts.text import TextPrompt
from tests.fixtures.prompts import TEXT, make
from tests.interpret.subjects import Ticks, queries, tiny_policy


def test_a_long_vector_is_flagged() -> None:
    assert not of_vectors([1.0, 1.4, 0.8])["raised"]
    found = of_vectors([1.0, 26.0, 0.8])
    assert found["raised"] and "Vector 1 is 26.0 times" in found["sentence"]


def test_one_query_that_is_changed_far_more_is_flagged() -> None:
    usual = np.asarray([0.20, 0.25, 0.22, 0.30, 0.28, 0.21])
    assert not of_queries(usual, queries())["raised"]
    usual[3] = 4.0
    found = of_queries(usual, queries())
    assert found["raised"] and queries()[3].text in found["sentence"]


def test_one_position_that_has_nearly_all_is_flagged() -> None:
    found = of_positions("attention", [0.01, 0.9, 0.02, 0.03])
    assert found is not None and found["raised"] and "Position 1" in found["sentence"]
    even = of_positions("attention", [0.2, 0.3, 0.2, 0.3])
    assert even is not None and not even["raised"]
    assert of_positions("attention", [0.1, 0.9]) is None
    assert of_positions("attention", [0.0, -1.0, 0.0, 0.0]) is None


def test_equal_values_have_no_outlier() -> None:
    assert robust_z(np.ones(5)) == pytest.approx(np.zeros(5))


def test_the_nearest_text_of_a_text_is_the_text() -> None:
    policy = tiny_policy()
    found = nearest(policy, make("soft", policy))
    assert found is not None and found.text == TEXT and found.gap == pytest.approx(0.0, abs=1e-5)
    assert [row["norm"] > 0 for row in found.rows] == [True] * len(found.tokens)
    assert nearest(policy, make("prefix", policy)) is None
    assert nearest(policy, TextPrompt(TEXT)) is None


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.1, 0.3, "wayward"), (0.6, 0.9, "explains"), (0.3, 0.7, "unclear")],
)
def test_the_verdict_on_the_nearest_text_needs_an_interval(
    low: float, high: float, said: str
) -> None:
    assert verdict({"value": (low + high) / 2, "low": low, "high": high}) == said
    assert verdict(None) == "unknown"


def test_shares_are_said_with_their_interval() -> None:
    assert percent({"value": 0.714, "low": 0.5, "high": 0.9}) == "71% (50% to 90%)"
    assert percent(None) == "an unknown share"


def test_time_is_shared_out_and_what_is_left_goes_on() -> None:
    now = [0.0]
    clock = Clock(1.0, lambda: now[0])
    first = clock.slice(1.0, 4.0)
    assert first.seconds_left == 15.0 and first.allows(15.0) and not first.allows(16.0)
    now[0] = 5.0  # it ends early
    assert clock.slice(1.0, 3.0).seconds_left == pytest.approx(55.0 / 3)
    now[0] = 100.0
    assert first.is_over and clock.slice(1.0, 1.0).is_over and clock.seconds == 100.0
    assert Slice(10.0, Ticks()).part(0.5).seconds_left < 5.0
