"""What writes for a searcher: a language model that is given a conversation and answers it.

A searcher over texts needs somebody who proposes them. `BaseWriter` is what completions are drawn
from, the frozen base as a rule, under a system text that is not the prompt that is searched. Other
writers are entries of `WRITERS` in `search/make_writer.py`: a class with `Settings` and `make`,
chosen by `search.writer.type`. What a writer gives is text from a model: a searcher has to expect
anything there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from rlprompt.engines.base import Engine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.search.base import SearchStart
from rlprompt.settings import ChosenSettings
from rlprompt.types import Query


class WriterSettings(ChosenSettings):
    """What every writer can be told: how its tokens are drawn."""

    temperature: float = Field(default=1.0, ge=0.0, le=10.0)
    """Of the writer's tokens, apart from `sampling.temperature`; 0 = always the most likely one."""
    top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    """Draw the writer's tokens from the fewest whose probabilities reach it."""
    max_tokens: int = Field(default=160, ge=1, le=2**20)
    """Longest answer of the writer."""

    @property
    def sampling(self) -> SamplingSettings:
        """The same, as `Writer.write` takes it."""
        return SamplingSettings(
            temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens
        )


class Writer(ABC):
    """Answers conversations; equal calls give equal answers where the model can be seeded."""

    Settings: ClassVar[type[WriterSettings]] = WriterSettings
    """What a recipe may say of it."""

    @classmethod
    @abstractmethod
    def make(cls, settings: Any, given: SearchStart) -> Self:
        """The writer of a recipe.

        Args:
            settings: an instance of `Settings`.
            given: where the search starts.

        Raises:
            InputError: it cannot write here.
        """

    @abstractmethod
    def write(
        self, asked: Sequence[Query], sampling: SamplingSettings, seed: int, system: str = ""
    ) -> list[str]:
        """One answer per conversation, in order.

        Args:
            asked: the conversations, at least one.
            sampling: how tokens are drawn.
            seed: the seed of the draw.
            system: the system text of all conversations; empty = none.

        Raises:
            InputError: the model cannot be asked.
        """


class BaseWriterSettings(WriterSettings):
    """The model that completions are drawn from writes, with the run's own engine."""

    type: Literal["base"] = "base"
    """Writer."""


class BaseWriter(Writer):
    """What the run's engine draws from: the frozen base, as a rule."""

    Settings: ClassVar[type[WriterSettings]] = BaseWriterSettings

    def __init__(self, engine: Engine) -> None:
        """Write with the engine; another prompt must be synced before it is drawn again."""
        self._engine = engine

    @classmethod
    def make(cls, settings: BaseWriterSettings, given: SearchStart) -> Self:
        """The writer of a recipe; see `Writer.make`."""
        del settings
        if given.engine is None:
            raise InputError(
                "search.writer is the base, and this search was given no engine to draw from it; "
                "give SearchStart an engine, or remove the writer"
            )
        return cls(given.engine)

    def write(
        self, asked: Sequence[Query], sampling: SamplingSettings, seed: int, system: str = ""
    ) -> list[str]:
        """See `Writer.write`."""
        self._engine.sync(TextPrompt(system) if system.strip() else NonePrompt())
        groups = self._engine.generate(asked, 1, sampling, seed).groups
        return [group.completions[0].text for group in groups]
