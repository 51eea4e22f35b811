"""The plain values that layers hand to each other.

Letters: B completions, G group size, T tokens, P prefix tokens, m virtual tokens, L layers,
H_kv key/value heads, D head dimension, V vocabulary. Masks: True = the position counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # a reward's worker process must start without torch
    from torch import Tensor, nn

Message = dict[str, str]
"""One turn of a conversation: `{"role": "user" | "assistant" | "system", "content": text}`."""


@dataclass(frozen=True)
class Surroundings:
    """Other text in the system turn, before and behind a prompt."""

    before: str = ""
    """Text before it; empty = none."""
    after: str = ""
    """Text behind it; empty = none."""
    is_frame: bool = False
    """Whether it is a frame around the trained prompt alone; else reference and teacher stand among
    it as well."""


@dataclass(frozen=True)
class Query:
    """The conversation given by a dataset or a user; what the completions answer."""

    messages: tuple[Message, ...]
    """Turns in order; the last one is the user's. No system turn: that is the prompt's place."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Extra dataset columns of this row, handed to rewards by name."""
    index: int = 0
    """Row number in its dataset before splitting; identifies the query in logs."""
    conversational: bool = True
    """False when the dataset row was a plain string: rewards then see strings, not messages."""
    place: str = field(default="", compare=False)
    """Where the row stands, such as `queries.jsonl line 7`, for error messages; empty where it is
    from no file."""
    situation: str = ""
    """Name of the situation that a training query is asked in, where a recipe has any."""
    around: Surroundings | None = None
    """Other system text that a training query is asked under, beside the prompt; None = none."""

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Completion:
    """What the model wrote for one query, with the engine's own log-probabilities."""

    token_ids: tuple[int, ...]
    """Generated tokens, the stop token included when there was one. At least one, unless the model
    is elsewhere and its tokens are not known."""
    sampling_logprobs: tuple[float, ...]
    """Natural-log probability of each token under the tempered, untruncated distribution; none
    without tokens."""
    text: str
    """Decoded tokens without control tokens."""
    terminated: bool
    """True when a stop token ended it, False when it ran into the token limit."""
    counted: int | None = None
    """Number of tokens as a server counts them, where they are not known themselves."""

    @property
    def num_tokens(self) -> int:
        """Its length in tokens of the model that wrote it."""
        return len(self.token_ids) if self.counted is None else self.counted


@dataclass(frozen=True)
class Group:
    """The completions of one query."""

    query: Query
    completions: tuple[Completion, ...]


class LinearShape(NamedTuple):
    """The shape of a linear layer's weight."""

    outputs: int
    inputs: int


class KVShape(NamedTuple):
    """The keys, or values, of one position in a base."""

    layers: int
    """L."""
    heads: int
    """H_kv."""
    dim: int
    """D."""


@dataclass(frozen=True)
class LowRank:
    """What LoRA adds to the output of a linear layer: up(scale * down(x)).

    down: [r, in].
    up: [out, r].
    """

    down: Tensor
    up: Tensor
    scale: float


class Adapter(Protocol):
    """A change of a base's layers, such as LoRA.

    Keys and values that were made under it belong to tokens that are computed under it: a
    `PrefixKV` carries its adapter, and whoever attends to the prefix has it on.
    """

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Change the layers of a base, without touching its weights; the result undoes it."""
        ...

    def snapshot(self) -> Adapter:
        """A copy without gradients that later updates leave alone."""
        ...

    def low_rank(self) -> Mapping[str, LowRank] | None:
        """What is added to layers, by full name; None = they are changed in another way."""
        ...


@dataclass(frozen=True)
class PrefixKV:
    """Keys and values of the tokens that every row of a batch shares.

    keys, values: one tensor per layer, [H_kv, P, D], rotary embedding already applied to keys.
    adapter: what must be on in the layers wherever they are attended to; None = the plain base.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    adapter: Adapter | None = None

    @property
    def num_tokens(self) -> int:
        """P, the number of shared positions."""
        return int(self.keys[0].shape[1])

    def cut(self, tokens: int) -> PrefixKV:
        """The first so many positions."""
        keys, values = [k[:, :tokens] for k in self.keys], [v[:, :tokens] for v in self.values]
        return replace(self, keys=keys, values=values)

    def snapshot(self) -> PrefixKV:
        """The same prefix, whose adapter no longer follows the prompt's updates."""
        return self if self.adapter is None else replace(self, adapter=self.adapter.snapshot())


class Stateful(Protocol):
    """Something beside the prompt that learns or adapts; its state is tensors."""

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` takes."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; ValueError when names or shapes differ."""
        ...
