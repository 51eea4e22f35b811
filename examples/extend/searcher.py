"""A searcher of your own: it climbs from text to better text by swapping one phrase at a time.

    prompt: {type: text, text: "You are an assistant."}
    search:
      type: searcher.py:Climb
      phrases:
        - ["Answer in one sentence.", "Be brief."]
        - ["Use plain words."]

In each step the best text so far and one neighbour of it answer the same queries, with the same
random numbers; the neighbour takes its place where it does better on average. The search is over
when every neighbour was refused.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from pydantic import Field

import rlprompt.extend as rl


class ClimbSettings(rl.SearchSettings):
    """Climb from text to better text by swapping one phrase at a time."""

    phrases: tuple[tuple[str, ...], ...] = Field(min_length=1)
    """For each place behind the text of the start, what may stand there. All begin empty."""


class Climb(rl.Searcher):
    """Hill climbing with common random numbers."""

    Settings = ClimbSettings
    starts_from = ("text",)

    def __init__(self, settings: ClimbSettings, given: rl.SearchStart) -> None:
        """Begin at the start, where every place is empty."""
        self._seed = given.seed
        self._text = given.prompt.init_text
        self._options = [("", *phrases) for phrases in settings.phrases]
        self._best = rl.Candidate(0, given.prompt, origin="start")
        self._choice = [0] * len(self._options)
        self._rival = self._choice
        self._refused: list[list[int]] = []
        self._made = 0

    @classmethod
    def make(cls, settings: Any, given: rl.SearchStart) -> Climb:
        """The searcher of a recipe."""
        return cls(settings, given)

    def ask(self) -> Sequence[rl.Candidate]:
        """The best text so far, and a neighbour that was not refused yet."""
        left = self._neighbours()
        self._rival = random.Random(f"{self._seed} {self._made}").choice(left)
        prompt, parents = self._prompt(self._rival), (self._best.id,)
        return [self._best, rl.Candidate(self._made + 1, prompt, parents, "swap")]

    def tell(self, trials: Sequence[rl.Trial]) -> None:
        """Go to the neighbour where it is better, query by query."""
        here, there = trials
        self._made = there.candidate.id
        if (there.query_rewards - here.query_rewards).nanmean() > 0:  # False for NaN
            self._best, self._choice, self._refused = there.candidate, self._rival, []
        else:
            self._refused.append(self._rival)

    @property
    def incumbent(self) -> rl.Candidate:
        """The best text so far."""
        return self._best

    @property
    def is_over(self) -> bool:
        """Whether every neighbour was refused."""
        return not self._neighbours()

    def state(self) -> rl.LearnerState:
        """Where the climb stands, as plain values; a text needs no tensors."""
        parents = list(self._best.parents)
        best = {"id": self._best.id, "parents": parents, "origin": self._best.origin}
        kept = {"choice": self._choice, "refused": list(self._refused), "made": self._made}
        return rl.LearnerState({}, kept | {"best": best})

    def restore(self, state: rl.LearnerState) -> None:
        """Go on where `state` was taken."""
        plain, best = state.plain, state.plain["best"]
        self._choice, self._refused = list(plain["choice"]), list(plain["refused"])
        self._made = int(plain["made"])
        prompt = self._prompt(self._choice)
        self._best = rl.Candidate(best["id"], prompt, tuple(best["parents"]), best["origin"])

    def _neighbours(self) -> list[list[int]]:
        """Choices that differ from the present one in one place and were not refused since."""
        found = []
        for place, options in enumerate(self._options):
            for option in range(len(options)):
                choice = [*self._choice[:place], option, *self._choice[place + 1 :]]
                if choice != self._choice and choice not in self._refused:
                    found.append(choice)
        return found

    def _prompt(self, choice: Sequence[int]) -> rl.TextPrompt:
        phrases = [options[number] for options, number in zip(self._options, choice, strict=True)]
        return rl.TextPrompt(" ".join([self._text, *filter(None, phrases)]))
