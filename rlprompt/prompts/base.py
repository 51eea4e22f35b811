"""What a prompt is: something that makes a prefix, and the little that trains.

Letters: m virtual tokens, d model width, P prefix tokens, L layers, H_kv key/value heads, D head
dim.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

from safetensors.torch import save
from torch import Tensor, nn

from rlprompt.errors import InputError
from rlprompt.settings import ChosenSettings
from rlprompt.types import Adapter, KVShape, LinearShape, Message, PrefixKV


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

    @property
    def hidden_size(self) -> int:
        """d, the width of an embedding."""
        ...

    @property
    def kv_shape(self) -> KVShape:
        """Layers, heads and head dim of its keys and values."""
        ...

    @property
    def linear_shapes(self) -> Mapping[str, LinearShape]:
        """The shape of every linear layer inside the decoder's layers, by its full name."""
        ...

    def embedding_norm(self) -> float:
        """Median norm of a vocabulary embedding."""
        ...

    def embedding_rms(self) -> float:
        """Root mean square of the entries of vocabulary embeddings."""
        ...

    def slot_ids(self, text: str) -> list[int]:
        """A text as tokens of the slot."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Tokens as text, without control tokens."""
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

    def prefill(
        self,
        embeddings: Tensor,
        after: PrefixKV | None = None,
        adapter: Adapter | None = None,
    ) -> PrefixKV:
        """Keys and values of [n, d] embeddings that stand after a prefix, which is included."""
        ...

    def head_prefix(self) -> PrefixKV:
        """The prefix of the head alone, without gradient."""
        ...


class PromptSettings(ChosenSettings):
    """What the settings of every representation answer before anything is built."""

    @property
    def trains(self) -> bool:
        """Whether there is something to train."""
        return True

    @property
    def adapts_layers(self) -> bool:
        """Whether its prefix comes with an adapter on the base's layers."""
        return False

    @property
    def keeps_place(self) -> bool:
        """Whether it means nothing behind other tokens than those that it was made behind."""
        return False


Loader = Callable[[str], "Prompt"]
"""The prompt of the artifact at a path of a recipe."""


def load_nothing(path: str) -> Prompt:
    """The loader where no artifact can be read.

    Raises:
        InputError: always.
    """
    raise InputError(f"prompt.from_artifact is '{path}', and nothing here reads it; leave it out")


@dataclass(frozen=True)
class SavedPrompt:
    """What an artifact gives to the kind of prompt that it holds."""

    init_text: str
    tensors: Mapping[str, Tensor]
    """The content of `prompt.safetensors`."""
    details: Mapping[str, Any]
    """What `Prompt.artifact_details` gave."""
    file: Callable[[str], bytes]
    """Reads another file of the artifact, by relative path; raises OSError."""
    kinds: Mapping[str, type[Prompt]] = field(default_factory=dict)
    """The classes that it and its parts may be of, by `Prompt.kind`."""


class Prompt(ABC):
    """A system prompt of one representation.

    It knows nothing of rewards, loops or engines. Everything it needs of the base it asks of a
    `Conditioner`, so one prompt can be prefilled by any policy over the same base.
    """

    kind: ClassVar[str]
    """The representation's name in artifacts, and in recipes where it is built in."""
    Settings: ClassVar[type[PromptSettings]] = PromptSettings
    """What a recipe may say of it."""
    init_text: str = ""
    """The text it started from (what was left of it, where it was cut), or is; empty when there was
    none."""

    @classmethod
    @abstractmethod
    def create(
        cls,
        settings: Any,
        conditioner: Conditioner,
        seed: int,
        load: Loader = load_nothing,
        before: PrefixKV | None = None,
    ) -> Self:
        """The prompt that a recipe describes, before training.

        Args:
            settings: an instance of the class's `Settings`.
            conditioner: the base and its chat template.
            seed: seed of what is drawn.
            load: reader of the artifact that the settings name to start from.
            before: what stands before it in the slot; None = nothing, the head.

        Raises:
            InputError: it cannot be made on this base, or not from that artifact.
        """

    @classmethod
    @abstractmethod
    def restore(cls, saved: SavedPrompt) -> Self:
        """The prompt of an artifact.

        Raises:
            OSError, SafetensorError, LookupError, TypeError, ValueError: the artifact is damaged.
        """

    @abstractmethod
    def prefix(self, conditioner: Conditioner) -> PrefixKV:
        """Keys and values of head and slot, differentiable in `parameters()`."""

    def query_ids(self, conditioner: Conditioner, messages: Sequence[Message]) -> list[int]:
        """The tokens between this prompt and the completion."""
        return conditioner.tail_ids(messages)

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer trains; empty for a fixed prompt."""
        return []

    def gated_parameters(self) -> list[nn.Parameter]:
        """Those that a factor of zero multiplies in a fresh prompt, such as LoRA's A while B is 0.

        Their gradient is zero until the first update; that of all others must not be.
        """
        return []

    def scale(self, conditioner: Conditioner) -> float:
        """The size of a parameter's entry that means something to the base.

        A relative learning rate is relative to this, so that one value serves all representations.
        """
        del conditioner
        return 1.0

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

    def copy(self) -> Self:
        """The prompt as it is now, which later updates leave alone."""
        return copy.deepcopy(self)

    # What an artifact keeps, for `restore`.

    def check(self, conditioner: Conditioner) -> None:  # noqa: B027 (a text fits every base)
        """Refuse a base that the prompt's tensors do not fit.

        Raises:
            ValueError: it says what the prompt has and what the base needs.
        """

    def artifact_tensors(self) -> dict[str, Tensor]:
        """What `prompt.safetensors` holds: what the prompt is, without how it is being trained."""
        return self.state_dict()

    def artifact_details(self) -> dict[str, Any]:
        """What else is needed to restore it, as plain JSON values."""
        return {}

    def artifact_files(self, base: str) -> dict[str, bytes]:
        """The files of its artifact, by path relative to the artifact.

        Args:
            base: the id of the base, for formats that name it.
        """
        del base
        return {"prompt.safetensors": save(self.artifact_tensors(), {"format": "pt"})}


class EmbeddedPrompt(Prompt):
    """A prompt that is input embeddings: the base reads them in one forward, and that is all."""

    @abstractmethod
    def input_embeddings(self, conditioner: Conditioner) -> Tensor:
        """Head and slot, [P, d] in the base's dtype, differentiable in `parameters()`.

        A policy prefills those of several prompts together; see `Policy.prefixes`.
        """

    def prefix(self, conditioner: Conditioner) -> PrefixKV:
        """The embeddings, prefilled in one forward; gradients reach them."""
        return conditioner.prefill(self.input_embeddings(conditioner))


class SlotPrompt(Prompt):
    """A prompt that fills positions of the slot, so that others may stand before or after it."""

    @abstractmethod
    def extend(self, conditioner: Conditioner, before: PrefixKV) -> PrefixKV:
        """`before` and this prompt behind it, differentiable in both."""

    def prefix(self, conditioner: Conditioner) -> PrefixKV:
        """Head and slot."""
        return self.extend(conditioner, conditioner.head_prefix())


def whole_number(details: Mapping[str, Any], name: str) -> int:
    """A number among the details of an artifact.

    Args:
        details: details as the artifact has them.
        name: name of the number.

    Raises:
        LookupError: it is not there.
        TypeError: it is no integer.
    """
    value = details[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {str(value)[:40]!r}, which is no integer")
    return value


def check_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other names or shapes than a prompt's own.

    Raises:
        ValueError: they differ.
    """
    if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in own.items()}:
        raise ValueError(f"expected {_shapes(own)}, given {_shapes(state)}")


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items()) or "nothing"
