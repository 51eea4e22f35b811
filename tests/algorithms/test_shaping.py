"""Penalties for completions that ran into the token limit."""

from __future__ import annotations

import torch

from rlprompt.algorithms.shaping import missing_eos_penalty, overlong_penalty


def test_the_overlong_penalty_grows_over_its_margin() -> None:
    lengths = torch.tensor([1, 60, 80, 90, 100])
    assert overlong_penalty(lengths, 100, 40).tolist() == [0.0, 0.0, -0.5, -0.75, -1.0]


def test_only_cut_completions_miss_their_end() -> None:
    assert missing_eos_penalty(torch.tensor([True, False]), 2.0).tolist() == [0.0, -2.0]
