"""Prompts that train nothing: a hand-written text, and no prompt at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import field_validator
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.prompts.base import (
    Conditioner,
    EmbeddedPrompt,
    Loader,
    PromptSettings,
    SavedPrompt,
    SlotPrompt,
    load_nothing,
)
from rlprompt.types import Message, PrefixKV


class TextSettings(PromptSettings):
    """A hand-written system message: it is evaluated and talked to, not trained."""

    type: Literal["text"] = "text"
    """Representation."""
    text: str
    """The system message."""

    @field_validator("text")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("text is blank; write a system message")
        return value

    @property
    def trains(self) -> bool:
        """False."""
        return False


class TextPrompt(EmbeddedPrompt, SlotPrompt):
    """A hand-written system message: fixed tokens in the slot. The baseline to beat."""

    kind: ClassVar[str] = "text"
    Settings = TextSettings

    def __init__(self, text: str) -> None:
        """Keep the text.

        Raises:
            InputError: the text is empty.
        """
        if not text.strip():
            raise InputError("a text prompt is empty; write a system message, or use `none`")
        self.init_text = text

    @classmethod
    def create(
        cls,
        settings: TextSettings,
        conditioner: Conditioner,
        seed: int,
        load: Loader = load_nothing,
        before: PrefixKV | None = None,
    ) -> Self:
        """The prompt of its settings; the other arguments are those of every representation."""
        del conditioner, seed, load, before
        return cls(settings.text)

    @classmethod
    def restore(cls, saved: SavedPrompt) -> Self:
        """The prompt of an artifact."""
        return cls(saved.init_text)

    def input_embeddings(self, conditioner: Conditioner) -> Tensor:
        """Those of head and text."""
        return conditioner.embed([*conditioner.head_ids, *conditioner.slot_ids(self.init_text)])

    def extend(self, conditioner: Conditioner, before: PrefixKV) -> PrefixKV:
        """The text after a prefix."""
        return conditioner.prefill(conditioner.embed(conditioner.slot_ids(self.init_text)), before)


class NonePrompt(EmbeddedPrompt):
    """The conversation as the template renders it without a system message, its default included.

    "Base" in results means the frozen model under this prompt.
    """

    kind: ClassVar[str] = "none"

    @classmethod
    def create(
        cls,
        settings: Any,
        conditioner: Conditioner,
        seed: int,
        load: Loader = load_nothing,
        before: PrefixKV | None = None,
    ) -> Self:
        """The prompt; it has no settings, and no recipe names it."""
        del settings, conditioner, seed, load, before
        return cls()

    @classmethod
    def restore(cls, saved: SavedPrompt) -> Self:
        """The prompt; it has nothing to save."""
        del saved
        return cls()

    def input_embeddings(self, conditioner: Conditioner) -> Tensor:
        """Those of everything before the first user turn's text."""
        return conditioner.embed(conditioner.none_head_ids)

    def query_ids(self, conditioner: Conditioner, messages: Sequence[Message]) -> list[int]:
        """The rest of the conversation without a system turn."""
        return conditioner.none_tail_ids(messages)
