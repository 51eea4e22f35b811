"""A writer behind an OpenAI-compatible endpoint: a stronger model than the one that is prompted.

It asks through the run's ledger, so that what it writes counts for the budget and is paid for once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from rlprompt.endpoints.client import EndpointClient
from rlprompt.endpoints.settings import EndpointSettings
from rlprompt.engines.endpoint import question_of
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.search.base import SearchStart
from rlprompt.search.writer import Writer, WriterSettings
from rlprompt.types import Query


class EndpointWriterSettings(EndpointSettings, WriterSettings):
    """A model behind an endpoint writes, whatever completions are drawn from."""

    type: Literal["endpoint"] = "endpoint"
    """Writer."""


class EndpointWriter(Writer):
    """Answers of a model behind an endpoint."""

    Settings: ClassVar[type[WriterSettings]] = EndpointWriterSettings

    def __init__(self, settings: EndpointWriterSettings, client: EndpointClient) -> None:
        """Keep the parts; nothing is sent yet."""
        self.settings = settings
        self.client = client

    @classmethod
    def make(cls, settings: EndpointWriterSettings, given: SearchStart) -> Self:
        """The writer of a recipe; see `Writer.make`."""
        return cls(settings, EndpointClient(settings, given.ledger, where="search.writer"))

    def write(
        self, asked: Sequence[Query], sampling: SamplingSettings, seed: int, system: str = ""
    ) -> list[str]:
        """See `Writer.write`.

        Raises:
            InputError: the server gives no usable answer.
            BudgetSpentError: the next request may not fit into the budget.
        """
        first = [{"role": "system", "content": system}] if system.strip() else []
        questions = [
            question_of(
                self.settings, [*first, *query.messages], sampling, f"writer/{seed}/{place}"
            )
            for place, query in enumerate(asked)
        ]
        return [answer.choices[0].text for answer in self.client.ask(questions)]
