"""Which of several given system texts is best, by successive halving.

Jamieson and Talwalkar (2016, arXiv 1502.07943): in each round all remaining texts are tried
equally often, then the worse part is dropped, and every round costs the same, so that the texts
between which it is close are tried most. All texts of a round meet the same queries and draws, and
a text is judged by all of its completions so far, which those it is compared with have met too.

Letters: N texts in all, S texts that are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rlprompt.prompts.text import TextPrompt
from rlprompt.runs.learner import LearnerState
from rlprompt.search.base import Candidate, Searcher, SearchSettings, SearchStart, Trial


class TextsSettings(SearchSettings):
    """Which of several given system texts is best, by successive halving on training queries."""

    type: Literal["texts"] = "texts"
    """Searcher."""
    texts: tuple[str, ...] = Field(min_length=2)
    """System texts to choose from. The text of `prompt` takes part too."""
    keep: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Share of the texts that a round leaves, rounded down, and one at least."""
    completions: int = Field(default=24, ge=1)
    """Fewest completions of each text in the first round. A later round draws as many in all for
    the texts that are left."""

    @field_validator("texts")
    @classmethod
    def _differ(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for place, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"text {place} is blank; write a system message")
            if text in texts[:place]:
                raise ValueError(f"text {place} is there twice; remove one")
        return texts


class Texts(Searcher):
    """Races texts against each other; see the module."""

    Settings: ClassVar[type[SearchSettings]] = TextsSettings
    starts_from: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(self, texts: Sequence[str], keep: float, completions: int) -> None:
        """Nothing is tried yet.

        Args:
            texts: N different texts; the first is believed best until one was tried.
            keep: share of the texts that a round leaves, above 0 and below 1.
            completions: fewest completions of each text in the first round.
        """
        self._candidates = [
            Candidate(number, TextPrompt(text), origin="given") for number, text in enumerate(texts)
        ]
        self._keep = keep
        self._completions = completions
        self._left = list(range(len(texts)))
        self._drawn = 0
        """Completions of each remaining text in this round."""
        self._sums: Tensor = torch.zeros(len(texts), dtype=torch.float64)
        self._counts: Tensor = torch.zeros(len(texts), dtype=torch.int64)

    @classmethod
    def make(cls, settings: TextsSettings, given: SearchStart) -> Self:
        """The searcher of a recipe; see `Searcher.make`."""
        texts = dict.fromkeys([given.prompt.init_text, *settings.texts])
        return cls(list(texts), settings.keep, settings.completions)

    def ask(self) -> Sequence[Candidate]:
        """The texts that are left."""
        return [self._candidates[number] for number in self._left]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Count the scores, and drop texts where that ends a round."""
        for trial in trials:
            known = trial.rewards[~trial.rewards.isnan()]
            self._sums[trial.candidate.id] += known.double().sum()
            self._counts[trial.candidate.id] += known.numel()
        self._drawn += trials[0].rewards.numel()
        each = math.ceil(self._completions * len(self._candidates) / len(self._left))
        # Where nothing could be scored, nothing says which text to drop.
        if self._drawn >= each and bool(self._counts[self._left].any()):
            self._end_round()

    def _end_round(self) -> None:
        count = max(1, math.floor(self._keep * len(self._left)))
        self._left = sorted(self._ranked()[:count])
        self._drawn = 0

    def _ranked(self) -> list[int]:
        """The texts that are left, best first; those without a score are last, ties in order."""
        means = self._sums / self._counts  # [N] NaN without a score
        return sorted(self._left, key=lambda i: -float(means[i].nan_to_num(-math.inf)))

    @property
    def incumbent(self) -> Candidate:
        """The text with the highest mean reward of those that are left."""
        return self._candidates[self._ranked()[0]]

    @property
    def is_over(self) -> bool:
        """Whether one text is left."""
        return len(self._left) == 1

    def state(self) -> LearnerState:
        """What was tried, and which texts are left."""
        texts = [candidate.prompt.init_text for candidate in self._candidates]
        return LearnerState(
            {"sums": self._sums.clone(), "counts": self._counts.clone()},
            {"texts": texts, "left": list(self._left), "drawn": self._drawn},
        )

    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken; see `Searcher.restore`."""
        if state.plain["texts"] != [candidate.prompt.init_text for candidate in self._candidates]:
            raise ValueError("it chose between other texts")
        self._sums = state.tensors["sums"].clone()
        self._counts = state.tensors["counts"].clone()
        self._left = [int(number) for number in state.plain["left"]]
        self._drawn = int(state.plain["drawn"])
