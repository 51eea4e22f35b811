"""Prompts on a tiny base, ready to be inspected."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.interpret.clock import Slice
from rlprompt.interpret.subject import Subject, divided
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.rewards.runner import RewardRunner
from rlprompt.types import Group, Query
from tests.fixtures.tiny import tiny_base

QUESTIONS = (
    "what is rain",
    "what is sun",
    "where is land",
    "the men went in",
    "who is he",
    "is she there",
    "is the hand in the land",
    "answer in one line",
    "the rain and the sun",
)
SAMPLING = SamplingSettings(max_tokens=6)


def tiny_policy(dtype: torch.dtype = torch.float32) -> Policy:
    """A policy over a tiny Llama."""
    base = tiny_base(dtype=dtype)
    return Policy(base, ChatSlot.from_tokenizer(base.tokenizer))


def queries() -> list[Query]:
    """Nine queries."""
    return [
        Query(({"role": "user", "content": text},), index=place)
        for place, text in enumerate(QUESTIONS)
    ]


def answers(policy: Policy, prompt: Prompt, count: int = 3) -> list[Group]:
    """Completions of the first queries under a prompt."""
    engine = NativeEngine(policy)
    engine.sync(prompt)
    return list(engine.generate(queries()[:count], 1, SAMPLING, 0).groups)


def subject(
    policy: Policy,
    prompt: Prompt,
    rewards: RewardRunner | None = None,
    given: Mapping[str, Prompt] | None = None,
) -> Subject:
    """A prompt with three queries to choose on and six to measure on."""
    sides = divided(queries(), 9)
    return Subject(policy, prompt, sides, SAMPLING, rewards, 0, dict(given or {}))


class Ticks:
    """A clock of which every look takes a second."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return float(self.looks)


def forever() -> Slice:
    """Time that does not end."""
    return Slice(float("inf"), lambda: 0.0)


def ended() -> Slice:
    """No time at all."""
    return Slice(0.0, lambda: 1.0)
