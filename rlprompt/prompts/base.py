"""What a prompt is: something that makes a prefix, and the little that trains.

Letters: m virtual tokens, d model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor, nn

from rlprompt.types import Message, PrefixKV


class Conditioner(Protocol):
    """What a prompt may ask of the base and its chat template."""

    @property
    def head_ids(self) -> Sequence[int]:
        """Tokens before the slot."""
        ...

    @property
    def none_head_ids(self) -> Sequence[int]:
        """Tokens before the first user turn when no system message is given."""
        ...

    @property
    def vocab_size(self) -> int:
        """V, the number of embeddings."""
        ...

    def embedding_norm(self) -> float:
        """Median norm of a vocabulary embedding."""
        ...

    def slot_ids(self, text: str) -> list[int]:
        """A text as tokens of the slot."""
        ...

    def tail_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens after the slot."""
        ...

    def none_tail_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens after `none_head_ids`."""
        ...

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Input embeddings [n, d] in the base's dtype."""
        ...

    def prefill(self, embeddings: Tensor) -> PrefixKV:
        """Keys and values of [P, d] embeddings."""
        ...


class Prompt(ABC):
    """A system prompt of one representation.

    It knows nothing of rewards, loops or engines. Everything it needs of the base it asks of a
    `Conditioner`, so one prompt can be prefilled by any policy over the same base.
    """

    kind: ClassVar[str]
    """The representation's name in recipes and artifacts."""
    init_text: str = ""
    """The text it started from, or is; empty when there was none."""

    @abstractmethod
    def prefix(self, conditioner: Conditioner) -> PrefixKV:
        """Keys and values of head and slot, differentiable in `parameters()`."""

    def query_ids(self, conditioner: Conditioner, messages: Sequence[Message]) -> list[int]:
        """The tokens between this prompt and the completion."""
        return conditioner.tail_ids(messages)

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer trains; empty for a fixed prompt."""
        return []

    def metrics(self) -> dict[str, float]:
        """Numbers worth watching in training, such as norms."""
        return {}

    def constrain(self) -> None:  # noqa: B027 (a prompt need not have a trust region)
        """Return to the trust region after an update; nothing by default."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that restore the prompt, detached."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over tensors made by `state_dict`, on any device.

        Raises:
            ValueError: names or shapes differ.
        """
        if state:
            raise ValueError(f"a {self.kind} prompt has no tensors, given {sorted(state)}")
