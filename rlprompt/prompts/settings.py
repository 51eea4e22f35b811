"""Where a fresh prompt starts from: settings that representations share, and their tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field, model_validator

from rlprompt.errors import InputError
from rlprompt.prompts.base import PromptSettings

if TYPE_CHECKING:  # settings are read without torch
    from rlprompt.prompts.base import Conditioner

logger = logging.getLogger(__name__)

DEFAULT_TEXT = "You are a helpful assistant."


class StartSettings(PromptSettings):
    """A start from a text, from drawn tokens, or from an artifact."""

    num_virtual_tokens: int | None = Field(default=None, ge=1, le=4096)
    """m, the number of trained positions; null = as many as `init_text` or the artifact has. With
    fewer the text loses its end, with more it is repeated, and either is said in a warning."""
    init_text: str | None = DEFAULT_TEXT
    """Text that the prompt starts from; null = m random tokens of the vocabulary."""
    from_artifact: str | None = None
    """Artifact to start from in place of a text, relative to the recipe's folder."""

    @model_validator(mode="before")
    @classmethod
    def _artifact_replaces_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("from_artifact") is not None:
            return {"init_text": None, "num_virtual_tokens": None, **values}
        return values

    @model_validator(mode="after")
    def _start_is_known(self) -> StartSettings:
        if self.from_artifact is not None:
            if self.init_text is not None:
                raise ValueError("from_artifact and init_text are both given; keep one")
        elif self.num_virtual_tokens is None:
            if self.init_text is None:
                raise ValueError("num_virtual_tokens is null, which needs an init_text to count")
            if not self.init_text.strip():
                raise ValueError(_EMPTY)
        return self


_EMPTY = "init_text is empty; write a text, or null for a random start"


class Start(NamedTuple):
    """What a fresh prompt starts from."""

    token_ids: list[int]
    """m tokens."""
    text: str
    """What they say, for `Prompt.init_text`; empty for drawn ones."""


def fresh_start(text: str | None, length: int | None, conditioner: Conditioner, seed: int) -> Start:
    """The tokens of a text, repeated or cut to a length (as PEFT does), or drawn ones.

    A text that is repeated or cut is said in a warning, and the start's text is what is left of it.

    Args:
        text: the text; None draws `length` tokens of the vocabulary by `seed`.
        length: the number of tokens; None = as many as the text has.
        conditioner: the base, which has tokenizer and vocabulary.
        seed: the seed of the draw.

    Raises:
        InputError: the text has no tokens.
    """
    if text is None:
        assert length is not None  # settings refuse both being null
        return Start(_drawn(conditioner.vocab_size, length, seed), "")
    ids = conditioner.slot_ids(text)
    if not ids:
        raise InputError(f"prompt.{_EMPTY}")
    if length is None or length == len(ids):
        return Start(ids, text)
    token_ids = [ids[i % len(ids)] for i in range(length)]
    kept = conditioner.decode(token_ids)
    _say_change(ids, length, kept, conditioner)
    return Start(token_ids, kept)


def _say_change(ids: Sequence[int], length: int, kept: str, conditioner: Conditioner) -> None:
    """Warn that a prompt of so many tokens does not start from the text whose tokens are given."""
    lengths = f"the text to start from has {len(ids)} tokens and num_virtual_tokens is {length}"
    if length < len(ids):
        lost = conditioner.decode(ids[length:]).strip()
        change = f"it is cut to {kept!r} and loses {lost!r}"
    else:
        change = f"it is repeated, as {kept!r}"
    logger.warning("%s: %s; leave num_virtual_tokens out to start from the text", lengths, change)


def start_ids(
    text: str | None, length: int | None, conditioner: Conditioner, seed: int
) -> list[int]:
    """The tokens of `fresh_start`, whose arguments and errors these are."""
    return fresh_start(text, length, conditioner, seed).token_ids


def _drawn(vocab_size: int, length: int, seed: int) -> list[int]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(vocab_size, (length,), generator=generator)]
