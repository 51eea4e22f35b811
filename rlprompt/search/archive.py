"""All candidates of a search over texts and all that they scored, so that nothing is forgotten.

Scores of fitness queries and of test queries are kept apart: `worth` and `fitness_answers` read
the first, `test_answers` the second, and nothing reads both. See `rlprompt.search.promotion`.

Letters: M scores, C candidates, K columns: the total reward, then the objectives.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.prompts.text import TextPrompt
from rlprompt.runs.learner import LearnerState
from rlprompt.search.admission import text_key
from rlprompt.search.base import Candidate, Trial
from rlprompt.search.fitness import Array, Effects, effects
from rlprompt.search.promotion import Answer

Answers = Mapping[int, Sequence[Answer]]
"""What candidates scored, by candidate and in the order in which it came."""


class Worth:
    """What some of C candidates are worth; only differences mean something."""

    def __init__(self, found: Effects, place: Mapping[int, int], size: int) -> None:
        """Keep effects.

        Args:
            found: effects of those that were looked at.
            place: where each of them stands there.
            size: number of all candidates.
        """
        self._found, self._place = found, place
        self.mean: Array = np.full(size, -np.inf)
        """[C]; minus infinity for those that were not looked at."""
        self.mean[list(place)] = found.mean

    def deviation(self, one: int, other: int) -> float:
        """Standard deviation of what one candidate is believed to be better than another."""
        return self._found.deviation(self._place[one], self._place[other])


class Archive:
    """Candidates 0 to C - 1, and their scores query by query."""

    def __init__(self, objectives: Sequence[str] = (), window: int = 500) -> None:
        """Nothing is known.

        Args:
            objectives: names of the rewards that are kept beside the total.
            window: number of the last candidates that every estimate looks at.
        """
        self._window = window
        self._objectives = tuple(objectives)
        self.candidates: list[Candidate] = []
        self._known: set[str] = set()
        self._numbers: list[tuple[int, int, int, bool]] = []
        """Candidate, block, query, whether it is a test query's; one per score."""
        self._scores: list[tuple[float, ...]] = []
        """[M][K]"""
        self._num_blocks = 0
        self._seen: defaultdict[int, int] = defaultdict(int)
        self._answers: dict[bool, defaultdict[int, list[Answer]]] = {}
        """By whether they are a test's, and by candidate."""
        self._forget()
        self.calls = {"fitness": 0, "test": 0}
        """Completions that were scored on each kind of query."""

    def add(self, text: str, parents: tuple[int, ...] = (), origin: str = "given") -> Candidate:
        """Take up a new text as the next candidate."""
        candidate = Candidate(len(self.candidates), TextPrompt(text), parents, origin)
        self.candidates.append(candidate)
        self._known.add(text_key(text))
        return candidate

    def knows(self, text: str) -> bool:
        """Whether a candidate has this text, but for white space."""
        return text_key(text) in self._known

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
                answer = Answer(self._num_blocks + place, group.query.index, row[0])
                self._keep(number, answer, row, is_test=is_test)
            self.calls["test" if is_test else "fitness"] += trial.rewards.numel()
        self._num_blocks += len(trials[0].groups)

    def _keep(
        self, candidate: int, answer: Answer, scores: Sequence[float], *, is_test: bool
    ) -> None:
        self._numbers.append((candidate, answer.block, answer.query, is_test))
        self._scores.append(tuple(scores))
        self._answers[is_test][candidate].append(answer)
        if not is_test and not math.isnan(answer.score):
            self._seen[candidate] += 1

    def _forget(self) -> None:
        self._numbers.clear()
        self._scores.clear()
        self._seen.clear()
        self._answers = {kind: defaultdict(list) for kind in (False, True)}

    def _column(self, trial: Trial, name: str) -> Tensor:
        """[Q] means of a reward by query."""
        if name not in trial.values:
            raise InputError(
                f"search.objectives names '{name}', but the rewards are "
                f"{', '.join(trial.values)}; name one of them, or prompt_length"
            )
        return trial.values[name].double().nanmean(dim=1)

    def worth(self, needed: Collection[int], column: int = 0) -> Worth:
        """What candidates are worth on fitness queries; see `search.fitness.effects`.

        Args:
            needed: candidates that are to be known, beside the last `window` ones: an archive of
                thousands would take minutes.
            column: place of the score, 0 for the total reward, k for the k-th objective.
        """
        size = len(self.candidates)
        kept = sorted({*needed, *range(max(0, size - self._window), size)})
        place = {candidate: number for number, candidate in enumerate(kept)}
        rows = [
            (place[candidate], block, scores[column])
            for (candidate, block, _, is_test), scores in zip(
                self._numbers, self._scores, strict=True
            )
            if not is_test and candidate in place
        ]
        parents = [
            [place[parent] for parent in self.candidates[each].parents if parent in place]
            for each in kept
        ]
        columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
        return Worth(effects(columns[0], columns[1], columns[2], parents), place, size)

    def fitness_answers(self) -> Answers:
        """Rewards on fitness queries."""
        return self._answers[False]

    def test_answers(self) -> Answers:
        """Rewards on test queries."""
        return self._answers[True]

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
        self._num_blocks = int(state.plain["num_blocks"])
        self.calls = {kind: int(state.plain["calls"][kind]) for kind in ("fitness", "test")}
        self._forget()
        for (c, block, query, is_test), row in zip(numbers, scores.tolist(), strict=True):
            self._keep(c, Answer(block, query, row[0]), row, is_test=bool(is_test))
