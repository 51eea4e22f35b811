"""What is inspected: a prompt on its base, queries, and rewards where there are any.

Queries are divided: sentences are chosen on the first part (`selection`), and every number that is
said of them comes from the rest (`test`), on which nothing was chosen.

Letters: Q queries, n completions per query.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlprompt.certify.comparison import Scores, query_means
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.interpret.yardstick import Means, Yardstick
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt
from rlprompt.rewards.runner import RewardRunner
from rlprompt.types import Group, Query

FEWEST_QUERIES = 6
"""With fewer, neither part is enough for an interval."""


@dataclass(frozen=True)
class Sides:
    """Queries that choose, and queries that measure."""

    selection: tuple[Query, ...]
    test: tuple[Query, ...]


def divided(queries: Sequence[Query], limit: int) -> Sides:
    """Queries as a third that chooses and two thirds that measure, the same ones every time.

    Args:
        queries: the queries, in any order; equal conversations count once.
        limit: most queries to use.

    Raises:
        InputError: there are too few that differ.
    """
    unique = {_digest(query): query for query in queries}
    ordered = [unique[key] for key in sorted(unique)][:limit]
    if len(ordered) < FEWEST_QUERIES:
        raise InputError(
            f"{len(ordered)} different queries are too few to inspect a prompt on; give at least "
            f"{FEWEST_QUERIES} (--queries FILE)"
        )
    third = len(ordered) // 3
    return Sides(tuple(ordered[:third]), tuple(ordered[third:]))


def _digest(query: Query) -> str:
    turns = [f"{turn['role']}\0{turn['content']}" for turn in query.messages]
    return hashlib.sha256("\0\0".join(turns).encode("utf-8", "replace")).hexdigest()


@dataclass
class Subject:
    """A prompt on its base, with all that its inspection shares."""

    policy: Policy
    prompt: Prompt
    sides: Sides
    sampling: SamplingSettings
    rewards: RewardRunner | None
    """What scores completions; None = behaviour is all that is measured."""
    seed: int = 0
    given: Mapping[str, Prompt] = field(default_factory=dict)
    """Other artifacts' prompts on the same base, by name."""

    def __post_init__(self) -> None:
        """Make what is computed once."""
        self.engine = NativeEngine(self.policy)
        self.base: Prompt = NonePrompt()
        self._yardsticks: dict[str, Yardstick] = {}
        self._tables: dict[int, tuple[Prompt, Scores]] = {}
        self._drawn: dict[int, tuple[Prompt, tuple[Group, ...]]] = {}

    def draw(self, prompt: Prompt, queries: Sequence[Query], copies: int = 1) -> tuple[Group, ...]:
        """Completions of queries under a prompt, with the same draws under every prompt.

        Args:
            prompt: the prompt.
            queries: the queries, at least one.
            copies: number of completions of each.
        """
        self.engine.sync(prompt)
        return self.engine.generate(queries, copies, self.sampling, self.seed).groups

    def answers(self, prompt: Prompt) -> tuple[Group, ...]:
        """One completion of every test query under a prompt, drawn once.

        Args:
            prompt: the prompt.
        """
        known = self._drawn.get(id(prompt))
        if known is None:
            known = (prompt, self.draw(prompt, self.sides.test))
            self._drawn[id(prompt)] = known
        return known[1]

    def yardstick(self, side: str) -> Yardstick:
        """The inspected prompt's own completions on a side.

        Args:
            side: name of the side, `selection` or `test`.
        """
        if side not in self._yardsticks:
            if side == "test":
                groups = self.answers(self.prompt)
            else:
                groups = self.draw(self.prompt, self.sides.selection)
            self._yardsticks[side] = Yardstick(self.policy, self.prompt, groups)
        return self._yardsticks[side]

    def scores(self, prompt: Prompt) -> Scores | None:
        """[Q, 1] rewards of a prompt's answers to the test queries; None without rewards.

        Args:
            prompt: the prompt.
        """
        if self.rewards is None:
            return None
        if id(prompt) not in self._tables:
            total = self.rewards.score(self.answers(prompt), step=0).total
            table: Scores = total.double().numpy().reshape(len(self.sides.test), -1).copy()
            self._tables[id(prompt)] = (prompt, table)
        return self._tables[id(prompt)][1]

    def reward_means(self, prompt: Prompt) -> Means | None:
        """[Q] as `scores`, by query."""
        table = self.scores(prompt)
        return None if table is None else np.asarray(query_means(table))
