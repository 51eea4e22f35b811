"""All candidates of a search over texts and all that they scored, so that nothing is forgotten.

Scores of fitness queries and of test queries are kept apart: `effects` and `fitness_answers` read
the first, `test_answers` the second, and nothing reads both. See `rlprompt.search.promotion`.

Letters: M scores, C candidates, K columns: the total reward, then the objectives.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.prompts.text import TextPrompt
from rlprompt.runs.learner import LearnerState
from rlprompt.search.base import Candidate, Trial
from rlprompt.search.fitness import Effects, effects
from rlprompt.search.promotion import Answer

Answers = Mapping[int, Sequence[Answer]]
"""What candidates scored, by candidate and in the order in which it came."""


class Archive:
    """Candidates 0 to C - 1, and their scores query by query."""

    def __init__(self, objectives: Sequence[str] = ()) -> None:
        """Nothing is known.

        Args:
            objectives: names of the rewards that are kept beside the total.
        """
        self._objectives = tuple(objectives)
        self.candidates: list[Candidate] = []
        self._known: set[str] = set()
        self._numbers: list[tuple[int, int, int, bool]] = []
        """Candidate, block, query, whether it is a test query's; one per score."""
        self._scores: list[tuple[float, ...]] = []
        """[M][K]"""
        self._num_blocks = 0
        self._seen: defaultdict[int, int] = defaultdict(int)
        self.calls = {"fitness": 0, "test": 0}
        """Completions that were scored on each kind of query."""

    def add(self, text: str, parents: tuple[int, ...] = (), origin: str = "given") -> Candidate:
        """Take up a new text as the next candidate."""
        candidate = Candidate(len(self.candidates), TextPrompt(text), parents, origin)
        self.candidates.append(candidate)
        self._known.add(_key(text))
        return candidate

    def knows(self, text: str) -> bool:
        """Whether a candidate has this text, but for white space."""
        return _key(text) in self._known

    def text(self, candidate: int) -> str:
        """The text of a candidate."""
        return self.candidates[candidate].prompt.init_text

    def seen(self, candidate: int) -> int:
        """Fitness queries on which a candidate has a score, each time counted."""
        return self._seen[candidate]

    def record(self, trials: Sequence[Trial], *, is_test: bool) -> None:
        """Take up what came of the candidates of a step.

        Args:
            trials: trials of one step, on the same queries.
            is_test: whether those are test queries.

        Raises:
            InputError: an objective is not among the rewards.
        """
        for trial in trials:
            columns = [trial.query_rewards, *(self._column(trial, n) for n in self._objectives)]
            rows = torch.stack(columns, dim=1).tolist()  # [Q, K]
            number = trial.candidate.id
            for place, (group, row) in enumerate(zip(trial.groups, rows, strict=True)):
                block = self._num_blocks + place
                self._numbers.append((number, block, group.query.index, is_test))
                self._scores.append(tuple(row))
                self._count(number, row[0], is_test)
            self.calls["test" if is_test else "fitness"] += trial.rewards.numel()
        self._num_blocks += len(trials[0].groups)

    def _count(self, candidate: int, reward: float, is_test: bool) -> None:
        if not is_test and not math.isnan(reward):
            self._seen[candidate] += 1

    def _column(self, trial: Trial, name: str) -> Tensor:
        """[Q] means of a reward by query."""
        if name not in trial.values:
            raise InputError(
                f"search.objectives names '{name}', but the rewards are "
                f"{', '.join(trial.values)}; name one of them, or prompt_length"
            )
        return trial.values[name].double().nanmean(dim=1)

    def effects(self, column: int = 0) -> Effects:
        """What each candidate is worth on fitness queries; see `search.fitness.effects`.

        Args:
            column: 0 = the total reward, k = the k-th objective.
        """
        rows = [place for place, numbers in enumerate(self._numbers) if not numbers[3]]
        return effects(
            [self._numbers[place][0] for place in rows],
            [self._numbers[place][1] for place in rows],
            [self._scores[place][column] for place in rows],
            [candidate.parents for candidate in self.candidates],
        )

    def fitness_answers(self) -> Answers:
        """Rewards on fitness queries."""
        return self._answers(is_test=False)

    def test_answers(self) -> Answers:
        """Rewards on test queries."""
        return self._answers(is_test=True)

    def _answers(self, *, is_test: bool) -> Answers:
        found: defaultdict[int, list[Answer]] = defaultdict(list)
        for (candidate, block, query, kind), row in zip(self._numbers, self._scores, strict=True):
            if kind == is_test:
                found[candidate].append(Answer(block, query, row[0]))
        return found

    def state(self) -> LearnerState:
        """All of it; later calls do not touch it."""
        plain = {
            "candidates": [
                [each.prompt.init_text, list(each.parents), each.origin] for each in self.candidates
            ],
            "num_blocks": self._num_blocks,
            "calls": dict(self.calls),
        }
        numbers = torch.tensor(self._numbers, dtype=torch.int64).reshape(-1, 4)
        width = 1 + len(self._objectives)
        scores = torch.tensor(self._scores, dtype=torch.float64).reshape(-1, width)
        return LearnerState({"numbers": numbers, "scores": scores}, plain)

    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: other objectives were kept.
        """
        numbers, scores = state.tensors["numbers"].tolist(), state.tensors["scores"]
        if scores.shape[1] != 1 + len(self._objectives):
            raise ValueError("it had other objectives")
        self.candidates, self._known = [], set()
        for text, parents, origin in state.plain["candidates"]:
            self.add(text, tuple(int(parent) for parent in parents), origin)
        self._numbers = [(int(c), int(b), int(q), bool(t)) for c, b, q, t in numbers]
        self._scores = [tuple(row) for row in scores.tolist()]
        self._num_blocks = int(state.plain["num_blocks"])
        self.calls = {kind: int(state.plain["calls"][kind]) for kind in ("fitness", "test")}
        self._seen.clear()
        for (candidate, _, _, is_test), row in zip(self._numbers, self._scores, strict=True):
            self._count(candidate, row[0], is_test)


def _key(text: str) -> str:
    return " ".join(text.split())
