"""A race of several prompts on the same queries, in which the hopeless stop early.

Every ordered pair of prompts has a bet that the one is better than the other, and a bet that it is
not better by `min_effect` (`certify.acceptance`). A prompt leaves the race when another that is in
it is found better, or when it is found not to be worth waiting for against the incumbent. The
incumbent changes only to a prompt that was found better than it (successive elimination: Even-Dar,
Mannor and Mansour, JMLR 2006, with betting in the place of Hoeffding's bounds).

With N prompts each pair is tested at alpha / (N (N - 1)): with probability 1 - alpha no prompt is
ever taken for better than another that it is not better than, whenever the race is looked at or
stopped, and however many of its prompts are equal. All may meet the same queries, since they were
there before the queries were drawn. What is assumed and what breaks it: `certify.acceptance`.

Letters: N prompts, Q queries, J bets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlprompt.certify.acceptance import PairedTest

Scores = NDArray[np.float64]
"""[N, Q] reward of each prompt on each query; NaN = not tried, or not scored."""


class Race:
    """Prompts 0 to N - 1, of which 0 is the incumbent at the start."""

    def __init__(
        self,
        num_prompts: int,
        alpha: float = 0.05,
        spread: float | None = None,
        min_effect: float = 0.1,
        miss_rate: float = 0.1,
    ) -> None:
        """All prompts are in the race.

        Args:
            num_prompts: number of prompts, N, at least 2.
            alpha: probability that anything said of two prompts is ever wrong.
            spread: largest absolute difference of a query's rewards; None = only which of two
                prompts is better on a query counts.
            min_effect: smallest mean difference worth finding.
            miss_rate: probability of dropping a prompt that is better by `min_effect`, for each.

        Raises:
            ValueError: a number is out of its range.
        """
        if num_prompts < 2:
            raise ValueError(f"a race of {num_prompts} prompts has no winner to find; give 2")
        level = alpha / (num_prompts * (num_prompts - 1))
        self._tests = {
            (one, other): PairedTest(level, spread, min_effect, miss_rate)
            for one in range(num_prompts)
            for other in range(num_prompts)
            if one != other
        }
        self._left = list(range(num_prompts))
        self._incumbent = 0
        self._met: list[int | str] = []
        self._stale = False

    @property
    def left(self) -> Sequence[int]:
        """The prompts in the race, the incumbent among them."""
        return tuple(self._left)

    @property
    def incumbent(self) -> int:
        """0, or the last one that was found better than the incumbent before it."""
        return self._incumbent

    @property
    def is_over(self) -> bool:
        """Whether one prompt is left, or the last queries were none that it had not met before."""
        return len(self._left) == 1 or self._stale

    def test(self, one: int, other: int) -> PairedTest:
        """The evidence that prompt `one` is better than `other`."""
        return self._tests[one, other]

    def update(self, scores: Scores, queries: Sequence[int | str]) -> None:
        """Take up what the prompts in the race scored on one more batch of queries.

        Args:
            scores: [N, Q] rewards; rows of prompts that have left are not read.
            queries: [Q] names of the queries. Those met before are left out.

        Raises:
            ValueError: two rewards of a query differ by more than the spread.
        """
        met = set(self._met)
        fresh = [i for i, name in enumerate(queries) if name not in met]
        fresh = [i for i in fresh if queries.index(queries[i]) == i]
        self._stale = not fresh
        self._met += [queries[i] for i in fresh]
        for one in self._left:
            for other in self._left:
                if one != other:
                    self._tests[one, other].update(scores[one, fresh] - scores[other, fresh])
        self._drop()

    def _drop(self) -> None:
        for _ in range(len(self._left)):
            better = [each for each in self._left if self._beats_incumbent(each)]
            if not better:
                break
            # Of several, the one with most evidence; of equals, the earlier.
            self._incumbent = max(better, key=lambda i: (self._evidence(i), -i))
        self._left = [each for each in self._left if not self._is_beaten(each)]

    def _beats_incumbent(self, one: int) -> bool:
        if one == self._incumbent:
            return False
        return self._tests[one, self._incumbent].decision == "accept"

    def _evidence(self, one: int) -> float:
        return self._tests[one, self._incumbent].log_evidence

    def _is_beaten(self, one: int) -> bool:
        if one == self._incumbent:
            return False
        others = (other for other in self._left if other != one)
        if any(self._tests[other, one].decision == "accept" for other in others):
            return True
        return self._tests[one, self._incumbent].decision == "reject"

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values for `load_state_dict`."""
        return {
            "tests": [test.state_dict() for test in self._tests.values()],
            "left": list(self._left),
            "incumbent": self._incumbent,
            "met": list(self._met),
            "stale": self._stale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Args:
            state: what `state_dict` of a race of as many prompts gave.

        Raises:
            ValueError: it is of another number of prompts.
        """
        if len(state["tests"]) != len(self._tests):
            raise ValueError(f"it is of {math.isqrt(len(state['tests'])) + 1} prompts")
        self._tests = {
            pair: PairedTest.from_state(test)
            for pair, test in zip(self._tests, state["tests"], strict=True)
        }
        self._left = [int(each) for each in state["left"]]
        self._incumbent = int(state["incumbent"])
        self._met = list(state["met"])
        self._stale = bool(state["stale"])
