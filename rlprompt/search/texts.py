"""Which of several given system texts is best: by evidence, or by successive halving.

By evidence (`certify.racing`): every text is tried on the same queries. One leaves the race when
another is shown to be better, or when it is shown not to be worth waiting for; the incumbent, at
first the text of `prompt`, changes only to a text that is shown to be better. All that the search
says is right with a stated probability, however often it is looked at, and where nothing is shown
it ends with the text that it began with.

By halving (Jamieson and Talwalkar, 2016, arXiv 1502.07943): in each round all remaining texts are
tried equally often, then the worse part is dropped, and every round costs the same, so that the
texts between which it is close are tried most. All texts of a round meet the same queries and
draws, and a text is judged by all of its completions so far, which those it is compared with have
met too. It always names a winner, and says nothing of whether that is luck.

Letters: N texts in all, S texts that are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from rlprompt.certify.racing import Race
from rlprompt.errors import InputError
from rlprompt.prompts.text import TextPrompt
from rlprompt.runs.learner import LearnerState
from rlprompt.search.base import Candidate, Searcher, SearchSettings, SearchStart, Trial
from rlprompt.settings import Settings

KEEP = 0.5
COMPLETIONS = 24


class EvidenceSettings(Settings):
    """When a text is shown to be better than another; see `rlprompt.certify.acceptance`."""

    alpha: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Probability that the search ever takes a text for better than another that it is not."""
    spread: float | None = Field(default=None, gt=0.0)
    """Largest difference of two rewards of one query, such as 1 for rewards in [0, 1]; the mean
    reward is then compared. Null = the number of queries on which a text is better."""
    min_effect: float = Field(default=0.1, gt=0.0)
    """Smallest difference worth finding: of the mean reward, or without a spread of the shares of
    queries won and lost. Smaller takes more queries."""
    miss_rate: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Probability of dropping a text that is better than the incumbent by `min_effect`."""

    @model_validator(mode="after")
    def _effect_is_possible(self) -> Self:
        if self.min_effect >= (self.spread or 1.0):
            raise ValueError(
                f"min_effect is {self.min_effect:g}, which no text can reach; choose it below "
                f"{'1' if self.spread is None else f'the spread, {self.spread:g}'}"
            )
        return self


class TextsSettings(SearchSettings):
    """Which of several given system texts is best, on training queries.

    By evidence, unless `keep` or `completions` ask for successive halving.
    """

    type: Literal["texts"] = "texts"
    """Searcher."""
    texts: tuple[str, ...] = Field(min_length=2)
    """System texts to choose from. The text of `prompt` takes part too."""
    evidence: EvidenceSettings | None = None
    """When a text counts as better; null = its defaults, and halving where `keep` or `completions`
    is given."""
    keep: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Halving: share of the texts that a round leaves, rounded down, and one at least; 0.5 where
    only `completions` is given."""
    completions: int | None = Field(default=None, ge=1)
    """Halving: fewest completions of each text in the first round, 24 where only `keep` is given. A
    later round draws as many in all for the texts that are left."""

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Self:
        for name in ("keep", "completions"):
            if self.evidence is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is for halving and has no effect beside evidence; remove one of them"
                )
        return self

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

    def __init__(
        self,
        texts: Sequence[str],
        keep: float = KEEP,
        completions: int = COMPLETIONS,
        race: Race | None = None,
    ) -> None:
        """Nothing is tried yet.

        Args:
            texts: N different texts; the first is believed best until one was tried.
            keep: share of the texts that a round leaves, above 0 and below 1.
            completions: fewest completions of each text in the first round.
            race: a race of N prompts that decides by evidence, in place of rounds.
        """
        self._candidates = [
            Candidate(number, TextPrompt(text), origin="given") for number, text in enumerate(texts)
        ]
        self._keep = keep
        self._completions = completions
        self._race = race
        self._left = list(range(len(texts)))
        self._drawn = 0
        """Completions of each remaining text in this round."""
        self._sums: Tensor = torch.zeros(len(texts), dtype=torch.float64)
        self._counts: Tensor = torch.zeros(len(texts), dtype=torch.int64)

    @classmethod
    def make(cls, settings: TextsSettings, given: SearchStart) -> Self:
        """The searcher of a recipe; see `Searcher.make`."""
        texts = dict.fromkeys([given.prompt.init_text, *settings.texts])
        if settings.keep is not None or settings.completions is not None:
            return cls(list(texts), settings.keep or KEEP, settings.completions or COMPLETIONS)
        chosen = settings.evidence or EvidenceSettings()
        numbers = (chosen.alpha, chosen.spread, chosen.min_effect, chosen.miss_rate)
        return cls(list(texts), race=Race(len(texts), *numbers))

    def ask(self) -> Sequence[Candidate]:
        """The texts that are left."""
        return [self._candidates[number] for number in self._left]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Count the scores, and drop texts where that ends a round."""
        for trial in trials:
            known = trial.rewards[~trial.rewards.isnan()]
            self._sums[trial.candidate.id] += known.double().sum()
            self._counts[trial.candidate.id] += known.numel()
        if self._race is not None:
            self._weigh(trials, self._race)
            return
        self._drawn += trials[0].rewards.numel()
        each = math.ceil(self._completions * len(self._candidates) / len(self._left))
        # Where nothing could be scored, nothing says which text to drop.
        if self._drawn >= each and bool(self._counts[self._left].any()):
            self._end_round()

    def _weigh(self, trials: Sequence[Trial], race: Race) -> None:
        """Take up a step's rewards as evidence, query by query."""
        queries = [group.query.index for group in trials[0].groups]
        scores = np.full((len(self._candidates), len(queries)), np.nan)
        for trial in trials:
            scores[trial.candidate.id] = trial.query_rewards.numpy()
        try:
            race.update(scores, queries)
        except ValueError as error:
            raise InputError(f"search.evidence.spread does not hold: {error}") from error
        self._left = list(race.left)

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
        """The text shown to be best; by halving, that with the highest mean of those left."""
        if self._race is not None:
            return self._candidates[self._race.incumbent]
        return self._candidates[self._ranked()[0]]

    @property
    def is_over(self) -> bool:
        """Whether one text is left, or evidence asks for queries where all have been met."""
        return self._race.is_over if self._race is not None else len(self._left) == 1

    @property
    def num_next(self) -> int:
        """How many texts are left."""
        return len(self._left)

    def state(self) -> LearnerState:
        """What was tried, and which texts are left."""
        texts = [candidate.prompt.init_text for candidate in self._candidates]
        plain = {"texts": texts, "left": list(self._left), "drawn": self._drawn}
        if self._race is not None:
            plain["race"] = self._race.state_dict()
        return LearnerState({"sums": self._sums.clone(), "counts": self._counts.clone()}, plain)

    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken; see `Searcher.restore`."""
        if state.plain["texts"] != [candidate.prompt.init_text for candidate in self._candidates]:
            raise ValueError("it chose between other texts")
        if (self._race is None) != ("race" not in state.plain):
            raise ValueError("it chose by another rule")
        if self._race is not None:
            self._race.load_state_dict(state.plain["race"])
        self._sums = state.tensors["sums"].clone()
        self._counts = state.tensors["counts"].clone()
        self._left = [int(number) for number in state.plain["left"]]
        self._drawn = int(state.plain["drawn"])
