"""What a search over texts can still gain, against integrals and draws."""

from __future__ import annotations

import random

import numpy as np
import pytest

from rlprompt.prompts.text import TextPrompt
from rlprompt.search.base import Candidate
from rlprompt.search.expected_gain import ExpectedGain, expected_excess
from tests.fixtures.searches import trial


@pytest.mark.parametrize("mean", [-2.0, -0.3, 0.0, 0.7])
@pytest.mark.parametrize("deviation", [0.1, 1.0, 3.0])
def test_the_excess_of_a_normal_is_its_integral(mean: float, deviation: float) -> None:
    x = np.linspace(mean - 12 * deviation, mean + 12 * deviation, 400_001)
    density = np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))
    slow = float(np.sum(np.maximum(x, 0.0) * density) * (x[1] - x[0]))
    assert expected_excess(mean, deviation) == pytest.approx(slow, abs=1e-6)


def test_what_is_known_can_gain_only_what_it_is_better_by() -> None:
    assert expected_excess(-1.0, 0.0) == 0.0 and expected_excess(0.5, 0.0) == 0.5


def told(gain: ExpectedGain, means: list[float], steps: int, noise: float, seed: int = 0) -> None:
    draw = random.Random(seed)
    texts = [Candidate(i, TextPrompt(f"text {i}")) for i in range(len(means))]
    for _ in range(steps):
        gain.add([trial(c, [[means[c.id] + draw.gauss(0.0, noise)] for _ in "123"]) for c in texts])


def test_it_falls_as_a_worse_text_is_known_to_be_worse() -> None:
    found = []
    for steps in (3, 12, 96):
        of_seeds = []
        for seed in range(8):
            gain = ExpectedGain()
            told(gain, [1.0, 0.8], steps, 0.5, seed)
            of_seeds.append(gain.of(0) or 0.0)
        found.append(sum(of_seeds) / 8)
    assert found[0] > found[1] > found[2] and found[2] < 2e-3


def test_a_better_text_that_is_not_believed_yet_keeps_it_high() -> None:
    gain = ExpectedGain()
    told(gain, [0.2, 0.9, 0.1], 20, noise=0.1)
    assert gain.of(0) == pytest.approx(0.7, abs=0.05)


def test_it_says_nothing_before_eight_queries() -> None:
    gain = ExpectedGain()
    told(gain, [0.2, 0.9], 2, noise=0.1)
    assert gain.of(0) is None
    told(gain, [float("nan"), 0.9], 9, noise=0.1)
    assert gain.of(0) is None  # what could not be scored is no query seen


def test_it_goes_on_where_its_state_was_taken() -> None:
    one, other = ExpectedGain(), ExpectedGain()
    told(one, [0.2, 0.5], 5, noise=0.3)
    other.restore(one.state())
    for each in (one, other):
        told(each, [0.2, 0.5], 2, noise=0.3, seed=1)
    assert one.of(0) == other.of(0) != 0.0
