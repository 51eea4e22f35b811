"""Who stands best of a few prompts that are tried again and again: paired comparisons.

Two prompts are compared on the queries of the steps in which both were tried, where they met the
same random numbers. All queries count alike.

Letters: Q queries of a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rlprompt.certify.acceptance import PairedTest
from rlprompt.prompts.text import TextPrompt
from rlprompt.search.base import Candidate


class Gain(NamedTuple):
    """How much better one prompt is than another."""

    mean: float
    """Mean difference of a query's reward; NaN where no query has both."""
    error: float
    """Its standard error; 0 with fewer than two queries."""


@dataclass
class Contender:
    """A text that is being tried."""

    candidate: Candidate
    token_ids: tuple[int, ...]
    rewards: dict[int, list[float]] = field(default_factory=dict)
    """By step, [Q] mean reward of each query; NaN without any."""
    test: PairedTest | None = None
    """Evidence that it is better than the incumbent; None where none is asked for."""

    def gain_over(self, other: Contender) -> Gain:
        """How much better it is than another, on the steps that both were tried in."""
        steps = sorted(self.rewards.keys() & other.rewards.keys())
        rows = [np.subtract(self.rewards[step], other.rewards[step]) for step in steps]
        known = np.concatenate([np.zeros(0), *rows])
        known = known[~np.isnan(known)]
        if not len(known):
            return Gain(math.nan, 0.0)
        error = float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else 0.0
        return Gain(float(known.mean()), error)

    def state(self) -> dict[str, Any]:
        """Plain JSON values for `from_state`."""
        return {
            "id": self.candidate.id,
            "text": self.candidate.prompt.init_text,
            "parents": list(self.candidate.parents),
            "origin": self.candidate.origin,
            "token_ids": list(self.token_ids),
            "rewards": [[step, _without_nan(row)] for step, row in self.rewards.items()],
            "test": None if self.test is None else self.test.state_dict(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Contender:
        """A contender that goes on where another was.

        Args:
            state: what `state` gave.
        """
        made = Candidate(
            int(state["id"]), TextPrompt(state["text"]), tuple(state["parents"]), state["origin"]
        )
        rewards = {int(step): _with_nan(row) for step, row in state["rewards"]}
        test = None if state["test"] is None else PairedTest.from_state(state["test"])
        return cls(made, tuple(state["token_ids"]), rewards, test)


def best_by_margin(
    incumbent: Contender, others: Sequence[Contender], margin: float
) -> Contender | None:
    """The other that is better than the incumbent by most.

    Args:
        incumbent: the one to be replaced.
        others: the contenders for its place; of equals, the earlier.
        margin: standard errors of the difference by which it must be better.

    Returns:
        None where none is better by as much.
    """
    best, most = None, 0.0
    for each in others:
        gain = each.gain_over(incumbent)
        if gain.mean > most and gain.mean > margin * gain.error:
            best, most = each, gain.mean
    return best


def ranked(incumbent: Contender, others: Sequence[Contender]) -> list[Contender]:
    """The others by their mean difference from the incumbent, best first; unknown ones last.

    Args:
        incumbent: the one that all are compared with.
        others: the contenders; of equals, the earlier is first.
    """
    gains = {each.candidate.id: each.gain_over(incumbent).mean for each in others}
    order = {number: -math.inf if math.isnan(gain) else gain for number, gain in gains.items()}
    return sorted(others, key=lambda each: -order[each.candidate.id])


def _without_nan(row: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in row]


def _with_nan(row: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in row]
