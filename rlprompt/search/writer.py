"""What writes for a searcher: a language model that is given a conversation and answers it.

A searcher over texts needs somebody who proposes them. `BaseWriter` is the frozen base itself,
under a system text that is not the prompt that is searched; other writers are endpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from rlprompt.engines.base import Engine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.types import Query


class Writer(ABC):
    """Answers conversations; equal calls give equal answers where the model can be seeded."""

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


class BaseWriter(Writer):
    """The frozen base, drawn from with the run's own engine."""

    def __init__(self, engine: Engine) -> None:
        """Write with the engine's base; another prompt must be synced before it is drawn again."""
        self._engine = engine

    def write(
        self, asked: Sequence[Query], sampling: SamplingSettings, seed: int, system: str = ""
    ) -> list[str]:
        """See `Writer.write`."""
        self._engine.sync(TextPrompt(system) if system else NonePrompt())
        groups = self._engine.generate(asked, 1, sampling, seed).groups
        return [group.completions[0].text for group in groups]
