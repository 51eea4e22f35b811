"""Prompts that train nothing: a hand-written text, and no prompt at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rlprompt.errors import InputError
from rlprompt.prompts.base import Conditioner, Prompt
from rlprompt.types import Message, PrefixKV


class TextPrompt(Prompt):
    """A hand-written system message: fixed tokens in the slot. The baseline to beat."""

    kind: ClassVar[str] = "text"

    def __init__(self, text: str) -> None:
        """Keep the text.

        Raises:
            InputError: the text is empty.
        """
        if not text.strip():
            raise InputError("a text prompt is empty; write a system message, or use `none`")
        self.init_text = text

    def prefix(self, conditioner: Conditioner) -> PrefixKV:
        """Head and text, prefilled."""
        ids = [*conditioner.head_ids, *conditioner.slot_ids(self.init_text)]
        return conditioner.prefill(conditioner.embed(ids))


class NonePrompt(Prompt):
    """The conversation as the template renders it without a system message, its default included.

    "Base" in results means the frozen model under this prompt.
    """

    kind: ClassVar[str] = "none"

    def prefix(self, conditioner: Conditioner) -> PrefixKV:
        """Everything before the first user turn's text, prefilled."""
        return conditioner.prefill(conditioner.embed(conditioner.none_head_ids))

    def query_ids(self, conditioner: Conditioner, messages: Sequence[Message]) -> list[int]:
        """The rest of the conversation without a system turn."""
        return conditioner.none_tail_ids(messages)
