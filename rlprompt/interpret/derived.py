"""Prompts made of an inspected one to look at it: in a frame, with an answer begun, or cut.

Letters: m virtual tokens, d model width, P prefix positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import (
    Conditioner,
    EmbeddedPrompt,
    Loader,
    Prompt,
    SavedPrompt,
    load_nothing,
)
from rlprompt.prompts.prefix import PrefixPrompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.types import Message, PrefixKV

_MARKS = ("orchid", "7")
"""Two texts that are put where the vectors go, to find the tokens on both sides."""


class DerivedPrompt(Prompt):
    """A prompt that no recipe names and no artifact holds."""

    kind: ClassVar[str] = "derived"

    @classmethod
    def create(
        cls,
        settings: Any,
        conditioner: Conditioner,
        seed: int,
        load: Loader = load_nothing,
        before: PrefixKV | None = None,
    ) -> Self:
        """Nothing.

        Raises:
            InputError: always; it is made of another prompt.
        """
        del settings, conditioner, seed, load, before
        raise InputError("a derived prompt is made by `rlprompt inspect` only; name another type")

    @classmethod
    def restore(cls, saved: SavedPrompt) -> Self:
        """Nothing.

        Raises:
            TypeError: always; it is in no artifact.
        """
        del saved
        raise TypeError("a derived prompt is in no artifact")


class BegunPrompt(DerivedPrompt):
    """A prompt under which the first words of every answer are given."""

    def __init__(self, inner: Prompt, first_ids: Sequence[int]) -> None:
        """Join the parts.

        Args:
            inner: the prompt.
            first_ids: tokens that every answer begins with.
        """
        self._inner = inner
        self._first = list(first_ids)

    def prefix(self, conditioner: Conditioner) -> PrefixKV:
        """That of the prompt itself."""
        return self._inner.prefix(conditioner)

    def query_ids(self, conditioner: Conditioner, messages: Sequence[Message]) -> list[int]:
        """The query's own, and the first words of the answer."""
        return [*self._inner.query_ids(conditioner, messages), *self._first]


class QuotedPrompt(DerivedPrompt, EmbeddedPrompt):
    """Vectors in the middle of a user's turn, where the model reads them as something written.

    The vectors are patched in at the level of embeddings: Patchscopes (Ghandeharioun et al., 2024,
    arXiv 2401.06102) and InSPEcT (Ramati et al., 2024, arXiv 2410.11660) with source and target
    layer 0, where a soft prompt lives.
    """

    def __init__(self, vectors: Tensor, before: Sequence[int], after: Sequence[int]) -> None:
        """Join the parts.

        Args:
            vectors: the vectors [m, d].
            before: tokens before them, the template's included.
            after: tokens between them and what the model writes, at least one.
        """
        self._vectors = vectors
        self._before = list(before)
        self._after = list(after)

    def input_embeddings(self, conditioner: Conditioner) -> Tensor:
        """The tokens before, and the vectors."""
        before = conditioner.embed(self._before)
        return torch.cat([before, self._vectors.to(before)])

    def query_ids(self, conditioner: Conditioner, messages: Sequence[Message]) -> list[int]:
        """The tokens after, whatever the query."""
        del conditioner, messages
        return self._after


class CutPrompt(DerivedPrompt):
    """A prompt of which some positions of the slot are left out, and the others move up."""

    def __init__(self, vectors: Tensor) -> None:
        """Keep what is left.

        Args:
            vectors: the vectors [m, d] that are left; m may be 0.
        """
        self._vectors = vectors

    def prefix(self, conditioner: Conditioner) -> PrefixKV:
        """Head and the vectors that are left."""
        head = conditioner.embed(conditioner.head_ids)
        return conditioner.prefill(torch.cat([head, self._vectors.to(head)]))


def vectors_of(policy: Policy, prompt: Prompt) -> Tensor | None:
    """The vectors [m, d] that a prompt puts into the slot; None where it is more than vectors.

    Args:
        policy: the policy over its base.
        prompt: the prompt.
    """
    if isinstance(prompt, SoftPrompt):
        return prompt.embeddings.detach()
    if isinstance(prompt, TextPrompt):
        return policy.embed(policy.slot_ids(prompt.init_text)).float()
    return None


def without_positions(prefix: PrefixKV, head: int, kept: Sequence[int]) -> PrefixKV:
    """A prefix of which the slot keeps some positions.

    Args:
        prefix: keys and values of P positions.
        head: number of positions before the slot, which stay.
        kept: places in the slot, from 0 on, that stay.
    """
    places = torch.tensor([*range(head), *(head + place for place in kept)], dtype=torch.int64)
    keys = [key.index_select(1, places.to(key.device)) for key in prefix.keys]
    values = [value.index_select(1, places.to(value.device)) for value in prefix.values]
    return replace(prefix, keys=keys, values=values)


def quoted(policy: Policy, vectors: Tensor, frame: str, first: str) -> QuotedPrompt:
    """Vectors in a user's turn, with the answer begun.

    Args:
        policy: the policy over the base.
        vectors: the vectors [m, d].
        frame: the user's text, with `{}` where the vectors go.
        first: what the answer begins with; may be empty.

    Raises:
        InputError: the chat template leaves no place for them.
    """
    one, other = (
        [
            *policy.none_head_ids,
            *policy.none_tail_ids([{"role": "user", "content": frame.replace("{}", mark)}]),
        ]
        for mark in _MARKS
    )
    start = _equal(one, other)
    end = min(_equal(one[::-1], other[::-1]), min(len(one), len(other)) - start)
    if not end:
        raise InputError(
            f"the chat template of {policy.base.id} ends with the user's text, so vectors cannot "
            "be quoted in it; choose a template with a header for the answer"
        )
    after = one[len(one) - end :]
    return QuotedPrompt(vectors, one[:start], [*after, *first_ids(policy, first)])


def first_ids(policy: Policy, first: str) -> list[int]:
    """The tokens of an answer's first words, without the token that would end it.

    Args:
        policy: the policy over the base.
        first: the words; may be empty.
    """
    return policy.slot.completion_ids(first)[:-1] if first else []


def random_like(policy: Policy, prompt: Prompt, seed: int) -> Prompt | None:
    """A prompt of random directions and the norms of another: a control that means nothing.

    Args:
        policy: the policy over its base.
        prompt: the prompt whose norms it has: each vector's, or each head's keys and values at each
            position.
        seed: seed of the directions.

    Returns:
        None for a prompt that is neither vectors nor keys and values.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(prompt, PrefixPrompt):
        own = prompt.keys_values().detach()
    else:
        vectors = vectors_of(policy, prompt)
        if vectors is None:
            return None
        own = vectors
    drawn = torch.randn(own.shape, generator=generator).to(own)
    scaled = drawn * own.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
    if isinstance(prompt, PrefixPrompt):
        return PrefixPrompt(scaled, prompt.position)
    return SoftPrompt(scaled)


def _equal(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
