"""What prompts are learned for: a frozen base that is here, or a model behind an endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from rlprompt.prompts.base import Prompt


class Target(Protocol):
    """What a run asks of the model that its prompts are for, whatever can be known of it.

    `rlprompt.policy.Policy` is one, `rlprompt.engines.endpoint.RemoteModel` another.
    """

    @property
    def id(self) -> str:
        """What it is called in artifacts, summaries and trackers."""
        ...

    @property
    def identity(self) -> Mapping[str, str]:
        """What a checkpoint must find again to go on, by what it is in words."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """Hash over its weights; None where they are not here."""
        ...

    @property
    def template_hash(self) -> str | None:
        """Hash over its chat template; None where that is not here."""
        ...

    @property
    def endpoint(self) -> Mapping[str, str] | None:
        """Address and name of a model behind an endpoint; None of one that is here."""
        ...

    def verify(self) -> str | None:
        """The fingerprint, made anew where weights are here; RuntimeError if they have changed."""
        ...

    def positions(self, prompt: Prompt) -> int | None:
        """Tokens that a prompt takes in the system turn; None where nobody here can count them."""
        ...

    def machine(self) -> dict[str, Any]:
        """Where it computes, for `summary.json`."""
        ...

    def memory(self) -> dict[str, float | int]:
        """Bytes of its weights that this rank holds, for `summary.json`; empty without any."""
        ...
