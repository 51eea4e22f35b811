"""What a trial says of a candidate."""

from __future__ import annotations

import math

import torch

from rlprompt.prompts.text import TextPrompt
from rlprompt.search.base import Candidate
from tests.fixtures.searches import trial

NAN = math.nan


def test_means_leave_out_what_cannot_be_said() -> None:
    seen = trial(Candidate(3, TextPrompt("a")), [[1.0, NAN], [NAN, NAN], [0.5, 0.0]])
    assert seen.reward == (1.0 + 0.5 + 0.0) / 3
    by_query = seen.query_rewards
    assert by_query.dtype == torch.float64
    assert by_query[0] == 1.0 and by_query[1].isnan() and by_query[2] == 0.25
    assert math.isnan(trial(Candidate(0, TextPrompt("a")), [[NAN]]).reward)


def test_lengths_and_endings_have_the_shape_of_the_rewards() -> None:
    seen = trial(Candidate(0, TextPrompt("a")), [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert seen.lengths.tolist() == [[2, 2]] * 3
    assert seen.terminated.tolist() == [[True, True]] * 3
    assert seen.rewards.shape == seen.lengths.shape == seen.terminated.shape
