"""What a searcher is: it asks for prompts to be tried, and is told what came of them.

    searcher.ask()            candidates, to be tried on the queries of this step
      -> completions          of each candidate on the same queries, drawn with the same seeds
      -> rewards              one number per completion, NaN where it cannot be said
    searcher.tell(trials)     one trial per candidate
    searcher.incumbent        the candidate that is believed best now

A searcher sees outputs and scores only: no model, no gradient, no held-out query; but for one that
asks for them at its start (`SearchStart.engine`), as white-box searchers do. All candidates of
a step meet common random numbers, so that they can be compared query by query. Nobody but the
searcher decides what is tried next, how often, and when enough was tried.

Letters: Q queries of a step, n completions per query.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from rlprompt.endpoints.ledger import Ledger
from rlprompt.engines.base import Engine
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.runs.learner import LearnerState
from rlprompt.settings import ChosenSettings
from rlprompt.types import Group, Query


class SearchSettings(ChosenSettings):
    """What the settings of every searcher have."""

    completions_per_query: int = Field(default=1, ge=1, le=4096)
    """Completions of each of the step's queries under each candidate."""
    max_calls: int | None = Field(default=None, ge=1)
    """The most completions that the search draws and scores; null = as many as its steps take. The
    last step meets fewer queries where all do not fit, and is not begun where none does. A
    population shares it evenly."""

    @property
    def reward_names(self) -> Sequence[str]:
        """Rewards of the recipe that these settings name."""
        return ()


@dataclass(frozen=True)
class SearchStart:
    """What a searcher is given when it is made."""

    prompt: Prompt
    """The recipe's prompt, of one of the kinds in `Searcher.starts_from`; not to be changed."""
    seed: int
    """Seed of everything that the searcher draws itself."""
    engine: Engine | None = None
    """What completions are drawn with, for searchers that have the base write candidates or, by its
    policy, look inside of the base. None = outputs and scores are all there is."""
    queries: Sequence[Query] = ()
    """The training queries, for searchers that must not copy from them, or that choose themselves
    which of them their candidates meet."""
    queries_per_step: int = 1
    """Training queries that a step is meant to meet, for searchers that choose them themselves."""
    temperature: float = 1.0
    """Sampling temperature, 0 for greedy draws: `Completion.sampling_logprobs` are tempered by it
    (by 1 where it is 0), and so must be what they are compared with."""
    scale: float = 1.0
    """Size of an entry of the prompt's parameters that means something to the base; see
    `Prompt.scale`."""
    ledger: Ledger | None = None
    """What is asked of endpoints and may be spent; None = no budget and no journal."""

    @property
    def policy(self) -> Policy | None:
        """The policy over the base; None where there is no base, but outputs and scores alone."""
        return self.engine.policy if self.engine is not None and self.engine.has_base else None


@dataclass(frozen=True)
class Candidate:
    """A prompt to be tried."""

    id: int
    """Number of its own within the search, at least 0; the same prompt keeps it when it is asked
    for again."""
    prompt: Prompt
    """Nobody changes it once the searcher has given it away."""
    parents: tuple[int, ...] = ()
    """Ids of the candidates that it was made from."""
    origin: str = ""
    """A word on how it was made, such as `given`, `crossover` or `swap`."""


@dataclass(frozen=True)
class Trial:
    """What came of a candidate on the queries of one step."""

    candidate: Candidate
    groups: tuple[Group, ...]
    """The Q queries, each with its n completions. Other trials of the step have the same
    queries."""
    rewards: Tensor
    """[Q, n] float32: the total of each completion; NaN where it could not be said."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """Per reward of the recipe [Q, n] float32, unweighted; NaN where it gave None."""
    notes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Columns that rewards logged with `log_extra`: Q * n values, query by query."""

    @property
    def reward(self) -> float:
        """Mean of the known totals, NaN without any."""
        return float(self.rewards.double().nanmean())

    @property
    def query_rewards(self) -> Tensor:
        """[Q] float64: mean of the known totals of each query, NaN for one without any."""
        return self.rewards.double().nanmean(dim=1)

    @property
    def lengths(self) -> Tensor:
        """int64 [Q, n]: tokens of each completion."""
        return torch.tensor([[c.num_tokens for c in g.completions] for g in self.groups])

    @property
    def terminated(self) -> Tensor:
        """Bool [Q, n]: False where the token limit cut a completion."""
        return torch.tensor([[c.terminated for c in g.completions] for g in self.groups])


class Searcher(ABC):
    """Finds a prompt by trial; see the module for the order of calls.

    A step of a run calls `ask`, then `tell` with all that was asked for. Between steps it may read
    `incumbent`, `is_over` and `state`, in any order and any number of times; none of them changes
    anything. What a searcher draws at random must come from `SearchStart.seed` and from what
    `state` keeps, so that a resumed search is the uninterrupted one.
    """

    Settings: ClassVar[type[SearchSettings]] = SearchSettings
    """The settings that a recipe's `search` is read into."""
    starts_from: ClassVar[tuple[str, ...]] = ("text",)
    """Kinds of prompt (`prompt.type`) that it can start from."""

    @classmethod
    @abstractmethod
    def make(cls, settings: Any, given: SearchStart) -> Self:
        """The searcher of a recipe.

        Args:
            settings: an instance of `Settings`.
            given: where the search starts.

        Raises:
            InputError: nothing can be searched with these settings.
        """

    @abstractmethod
    def ask(self) -> Sequence[Candidate]:
        """The candidates of the next step: at least one, each id once.

        A candidate that is asked for again meets new queries. Not called when `is_over`.
        """

    @abstractmethod
    def tell(self, trials: Sequence[Trial]) -> None:
        """Learn from what came of the candidates that `ask` gave last, in their order."""

    @property
    @abstractmethod
    def incumbent(self) -> Candidate:
        """The candidate believed best; before the first `tell` it holds the prompt of the start.

        It is what the run evaluates on held-out queries, and what its artifact can hold.
        """

    @property
    def wanted_queries(self) -> Sequence[Query] | None:
        """The training queries that the candidates of the last `ask` are to meet.

        None = the next ones of the run's order, as many as `training.queries_per_step` says; that
        is what all searchers want that do not compare scores across steps. A step may meet fewer
        of them than are asked for, the first ones, where `max_calls` ends the search.
        """
        return None

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to ask for; the run then ends before its last step."""
        return False

    @property
    def num_next(self) -> int:
        """How many candidates the next `ask` gives at the fewest, at least 1.

        Where `max_calls` leaves no completion for each of them, nothing is asked for any more.
        """
        return 1

    @property
    def metrics(self) -> Mapping[str, float]:
        """Numbers of its own worth watching, such as forward passes that are no calls.

        A step logs them as `search/NAME` after its `tell`. Nothing by default.
        """
        return {}

    @abstractmethod
    def state(self) -> LearnerState:
        """All that `restore` needs, which later calls do not touch; asked for between steps only.

        Numbers that may be NaN belong into tensors, for JSON has none.
        """

    @abstractmethod
    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken, on a searcher that was made in the same way.

        Raises:
            ValueError: it was taken from a search that was made in another way.
        """
