"""The augment section of a recipe: a share of the training queries is asked in situations.

A prompt that is learned on bare queries may fail when an application wraps them, when a user tries
to talk the model out of its instructions, or when a long text stands before them. The situations
are those of evaluation suites (`rlprompt.data.situations`), so that a prompt can be trained against
what a suite has found, and frames around the prompt itself (`system_frame`), which make it easier
to read. They change what is asked and what stands beside the prompt, and nothing else: not the
row's columns, not the queries of validation and test.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from rlprompt.data.frames import QUERY
from rlprompt.data.situations import (
    PLAIN,
    SITUATIONS,
    Dialogue,
    Frame,
    Quantised,
    Sampling,
    Situation,
    SystemFrame,
    require_labels,
)
from rlprompt.errors import InputError
from rlprompt.settings import OneOf, Settings
from rlprompt.types import Query

_REFUSED: dict[type[Situation], str] = {
    Sampling: "changes how answers are drawn, and a batch is drawn in one way (see sampling)",
    Quantised: "needs a second base, and a run trains on one",
    Dialogue: "needs answers of the model between the turns, and a training query is asked once",
}
"""Situations that are more than another conversation -> why a training query has none of them."""
_ROUNDING = 1e-9
"""How far a sum of shares such as 0.7 + 0.2 + 0.1 may be from 1."""


AnyAugmentation = Annotated[
    Situation, OneOf({**SITUATIONS, "system_frame": SystemFrame}, is_extensible=False)
]


class AugmentSettings(Settings):
    """A situation that a share of the training queries is asked in."""

    situation: AnyAugmentation
    """What becomes of a query: one of the situations of evaluation suites that change the user's
    turns (frame, paraphrase, misspelt, long_context, earlier) or the text beside the prompt
    (system), or a sentence around the prompt (system_frame)."""
    share: float = Field(default=0.25, gt=0.0, le=1.0)
    """Share of the training queries that are asked so, by chance; all shares of the list together
    are at most 1, and what is left is asked as it is."""

    @model_validator(mode="before")
    @classmethod
    def _situation_has_its_own_keys(cls, value: Any) -> Any:
        if isinstance(value, dict) and "type" in value and "situation" not in value:
            raise ValueError(
                "type is a key of the situation; write {situation: {type: ..., its other keys}, "
                "share: ...}"
            )
        return value

    @field_validator("situation")
    @classmethod
    def _changes_the_query(cls, value: Situation) -> Situation:
        if type(value) in _REFUSED:
            raise ValueError(
                f"'{value.type}' {_REFUSED[type(value)]}; choose frame, paraphrase, misspelt, "
                "long_context, earlier, system or system_frame"
            )
        texts = value.texts if isinstance(value, Frame) else None
        if texts is not None and all(text == QUERY for text in texts):
            raise ValueError("texts has nothing beside {query}; write words around it")
        return value


def _checked(entries: tuple[AugmentSettings, ...]) -> tuple[AugmentSettings, ...]:
    """The entries, which must leave no more than all queries and have names of their own."""
    require_labels([entry.situation.label for entry in entries])
    total = math.fsum(entry.share for entry in entries)
    if total > 1.0 + _ROUNDING:
        raise ValueError(
            f"the shares add up to {total:g}, and a query is asked in one situation; lower them "
            "to 1 at most"
        )
    return entries


AugmentList = Annotated[tuple[AugmentSettings, ...], AfterValidator(_checked)]
"""The augment section."""


class Augmenter:
    """Asks queries in situations; equal queries and seeds give equal results."""

    def __init__(self, settings: Sequence[AugmentSettings], queries: Sequence[Query]) -> None:
        """Keep the settings.

        Args:
            settings: entries of the augment section, in order.
            queries: training queries.

        Raises:
            InputError: a situation leaves every one of the queries as it is.
        """
        self._settings = list(settings)
        for place, entry in enumerate(self._settings):
            situation = entry.situation
            if not situation.places and all(
                asked_in(situation, each, 0).messages == each.messages for each in queries
            ):
                raise InputError(
                    f"augment.{place} ({situation.label}) leaves every training query as it "
                    "is; change its settings or remove it"
                )

    def __call__(self, query: Query, seed: int) -> Query:
        """The query as it is asked this time, with the name of its situation.

        Args:
            query: training query.
            seed: seed of the step and the place in its batch; with the query's number it decides
                which situation it is, and what is drawn inside of it.
        """
        draws = random.Random(f"augment|{seed}|{query.index}")
        drawn, inner = draws.random(), draws.getrandbits(63)
        end = 0.0
        for entry in self._settings:
            end += entry.share
            if drawn < end or (entry is self._settings[-1] and end >= 1.0 - _ROUNDING):
                return asked_in(entry.situation, query, inner)
        return replace(query, situation=PLAIN)


def asked_in(situation: Situation, query: Query, seed: int) -> Query:
    """A query in a situation, with its columns and number.

    Args:
        situation: situation that changes the conversation, or the text beside the prompt.
        query: query as the data has it.
        seed: seed of what is drawn.
    """
    turns = tuple(dict(turn) for turn in situation.asked(query.messages, seed))
    around = situation.around(query.messages, seed)
    return replace(query, messages=turns, situation=situation.label, around=around)


def samples(settings: Sequence[AugmentSettings], query: Query, count: int = 8) -> Iterator[Query]:
    """Some of the ways in which a training query may be asked, to see how long they are.

    Args:
        settings: entries of the augment section.
        query: query as the data has it.
        count: ways per situation.
    """
    for entry in settings:
        for seed in range(count):
            yield asked_in(entry.situation, query, seed)
