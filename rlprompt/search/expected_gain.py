"""What a search over texts can be expected to gain by knowing better which of its texts is best.

The expected value of perfect information of one rival, the largest of all of them:

    max over rivals c of  E[max(0, worth of c - worth of the incumbent)]

The worths are those of `rlprompt.search.fitness.effects`, estimated from the search's own trials,
query by query; their difference is taken to be normal, with the deviation that they have there. It
is large while little is known, and goes to zero as each rival is known not to be better (expected
improvement: Mockus 1974; of correlated alternatives: Chick and Inoue, Operations Research 2001). It
says nothing of texts that were not tried yet: those tried last stand for them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from rlprompt.runs.learner import LearnerState
from rlprompt.search.base import Trial
from rlprompt.search.fitness import effects

SEEN = 8
"""Queries on which the incumbent has a score before anything is said."""


def expected_excess(mean: float, deviation: float) -> float:
    """E[max(0, X)] of a normal X: m Phi(m / s) + s phi(m / s).

    Args:
        mean: mean of X, m.
        deviation: standard deviation of X, s; 0 = X is known.
    """
    if deviation <= 0.0:
        return max(0.0, mean)
    at = mean / deviation
    density = math.exp(-0.5 * at * at) / math.sqrt(2.0 * math.pi)
    below = 0.5 * math.erfc(-at / math.sqrt(2.0))
    return max(0.0, mean * below + deviation * density)


class ExpectedGain:
    """Trials of a search over texts, and what it can still gain by them; see the module."""

    def __init__(self) -> None:
        """Nothing was tried."""
        self._parents: dict[int, tuple[int, ...]] = {}
        self._numbers: list[tuple[int, int]] = []
        """Candidate and block of each score; a block is one query of one step."""
        self._scores: list[float] = []
        self._blocks = 0
        self._rivals: list[int] = []

    def add(self, trials: Sequence[Trial], *, are_rivals: bool = True) -> None:
        """Take up a step.

        Args:
            trials: trials of texts on the same queries.
            are_rivals: whether these texts are all that the search would try again.
        """
        for trial in trials:
            self._parents[trial.candidate.id] = tuple(trial.candidate.parents)
            for place, score in enumerate(trial.query_rewards.tolist()):
                if math.isfinite(score):
                    self._numbers.append((trial.candidate.id, self._blocks + place))
                    self._scores.append(score)
        self._blocks += len(trials[0].groups)
        if are_rivals:
            self._rivals = [trial.candidate.id for trial in trials]

    def of(self, incumbent: int) -> float | None:
        """What the rivals of the last step can be expected to gain, in units of the reward.

        Args:
            incumbent: id of the text believed best.

        Returns:
            None while the incumbent was scored on fewer than 8 queries.
        """
        seen = Counter(candidate for candidate, _ in self._numbers)
        if seen[incumbent] < SEEN:
            return None
        known = sorted({incumbent, *self._rivals})
        place = {candidate: at for at, candidate in enumerate(known)}
        kept = [at for at, (candidate, _) in enumerate(self._numbers) if candidate in place]
        found = effects(
            [place[self._numbers[at][0]] for at in kept],
            [self._numbers[at][1] for at in kept],
            [self._scores[at] for at in kept],
            [
                [place[above] for above in self._parents.get(each, ()) if above in place]
                for each in known
            ],
        )
        own = place[incumbent]
        return max(
            expected_excess(float(found.mean[at] - found.mean[own]), found.deviation(at, own))
            for at in range(len(known))
        )

    def state(self) -> LearnerState:
        """All that `restore` needs."""
        numbers = torch.tensor(self._numbers, dtype=torch.int64).reshape(-1, 2)
        scores = torch.tensor(self._scores, dtype=torch.float64)
        parents = [[each, list(above)] for each, above in self._parents.items()]
        plain = {"parents": parents, "blocks": self._blocks, "rivals": list(self._rivals)}
        return LearnerState({"numbers": numbers, "scores": scores}, plain)

    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken.

        Args:
            state: what `state` gave.
        """
        plain = state.plain
        self._numbers = [(int(c), int(block)) for c, block in state.tensors["numbers"].tolist()]
        self._scores = [float(score) for score in state.tensors["scores"].tolist()]
        self._blocks = int(plain["blocks"])
        self._rivals = [int(each) for each in plain["rivals"]]
        self._parents = {int(each): tuple(map(int, above)) for each, above in plain["parents"]}
