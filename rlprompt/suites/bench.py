"""What measures and situations draw answers with, and what they give back.

Letters: N items of a measure, n answers per item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rlprompt.engines.base import Engine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.evaluation.measures import logprobs_by_query
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.settings import ChosenSettings, Name
from rlprompt.types import Completion, Group, Query

TOKEN_BUDGET = 2048
"""Packed tokens of one forward over given answers."""


@dataclass(frozen=True)
class Measured:
    """What a measure gives of one prompt."""

    values: Mapping[str, Sequence[Sequence[float | None]]]
    """Number by number, [N, n] values; None = unknown. Item i is the same for every prompt."""
    rows: Sequence[Mapping[str, Any]] = ()
    """Answers to look at: `query`, `answer` and what else there is to say of each."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Numbers that are no mean over items, so that they have no interval."""


class Bench:
    """A base with an engine, under settings that all prompts meet alike."""

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        sampling: SamplingSettings,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Join the parts.

        Args:
            policy: policy over the base.
            engine: engine over the same base.
            sampling: how answers are drawn where a measure does not say.
            seed: seed of all draws.
            progress: function that is called with tokens drawn and their limit.
        """
        self.policy = policy
        self.engine = engine
        self.sampling = sampling
        self.seed = seed
        self.progress = progress

    def answers(
        self,
        prompt: Prompt,
        queries: Sequence[Query],
        copies: int = 1,
        sampling: SamplingSettings | None = None,
    ) -> list[Group]:
        """Answers under a prompt.

        Args:
            prompt: the prompt.
            queries: queries to answer, at least one.
            copies: answers of each.
            sampling: how they are drawn; None = as the bench does.
        """
        self.engine.sync(prompt)
        asked = sampling or self.sampling
        drawn = self.engine.generate(queries, copies, asked, self.seed, self.progress)
        return list(drawn.groups)

    def sampled(self, max_tokens: int, temperature: float | None = None) -> SamplingSettings:
        """The settings of the bench with another length.

        Args:
            max_tokens: longest answer.
            temperature: temperature; None = as the bench does.
        """
        changes: dict[str, Any] = {
            "max_tokens": max_tokens,
            "min_tokens": min(self.sampling.min_tokens, max_tokens),
        }
        if temperature is not None:
            changes["temperature"] = temperature
        return self.sampling.model_copy(update=changes)

    def logprobs(
        self, prompt: Prompt, queries: Sequence[Query], answers: Sequence[str]
    ) -> list[float]:
        """Log-probability of a given answer to each query, in nats, without the end of the turn.

        Args:
            prompt: the prompt.
            queries: the queries.
            answers: one answer of each.
        """
        groups = [
            Group(
                query,
                (Completion(tuple(self.policy.slot.completion_ids(text)[:-1]), (), text, False),),
            )
            for query, text in zip(queries, answers, strict=True)
        ]
        return list(logprobs_by_query(self.policy, prompt, groups, TOKEN_BUDGET).totals)


class MeasureSettings(ChosenSettings):
    """What the settings of every measure have, and how it is made."""

    name: Name | None = None
    """What the measure is called in results; by default its type."""
    higher_is: ClassVar[Mapping[str, str]] = {}
    """Of each number, by the part of its name before a slash: `better`, `worse` or `other`."""
    shares: ClassVar[frozenset[str]] = frozenset()
    """Numbers, named so, whose values are between 0 and 1 whatever a prompt does."""

    @property
    def label(self) -> str:
        """Its name in results."""
        return self.name or self.type

    def missing(self) -> str:
        """Why it cannot be made here, as a sentence; empty where it can."""
        return ""

    def measure(self, bench: Bench, prompt: Prompt, about: Prompt) -> Measured:
        """Measure one prompt.

        Args:
            bench: what answers are drawn with.
            prompt: the prompt, or the base without one.
            about: the prompt that is evaluated, also where the base is measured beside it.

        Raises:
            InputError: something that it names is not there, or a query is too long.
        """
        raise NotImplementedError


def query_of(text: str, index: int = 0, **columns: Any) -> Query:
    """A query of one turn.

    Args:
        text: the user's turn.
        index: its number.
        columns: further columns.
    """
    return Query(({"role": "user", "content": text},), columns, index, False)


def shown(groups: Sequence[Group], **columns: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of answers, one per completion.

    Args:
        groups: queries with their completions.
        columns: further columns, one value per query.
    """
    return [
        {
            "query": group.query.text,
            "answer": completion.text,
            **{name: values[place] for name, values in columns.items()},
        }
        for place, group in enumerate(groups)
        for completion in group.completions
    ]
