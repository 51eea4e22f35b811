"""Where a fresh prompt starts from: settings that representations share, and their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from rlprompt.errors import InputError
from rlprompt.prompts.base import PromptSettings

if TYPE_CHECKING:  # settings are read without torch
    from rlprompt.prompts.base import Conditioner

DEFAULT_TEXT = "You are a helpful assistant."


class StartSettings(PromptSettings):
    """A start from a text, from drawn tokens, or from an artifact."""

    num_virtual_tokens: int | None = Field(default=None, ge=1, le=4096)
    """m, the number of trained positions; null = as many as `init_text` or the artifact has."""
    init_text: str | None = DEFAULT_TEXT
    """Text that the prompt starts from, repeated or cut to m tokens; null = random tokens of the
    vocabulary."""
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
        elif self.num_virtual_tokens is None and not (self.init_text or "").strip():
            raise ValueError("num_virtual_tokens is null, which needs an init_text to count")
        return self


def start_ids(
    text: str | None, length: int | None, conditioner: Conditioner, seed: int
) -> list[int]:
    """The tokens of a text, repeated or cut to a length (as PEFT does), or drawn ones.

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
        return _drawn(conditioner.vocab_size, length, seed)
    ids = conditioner.slot_ids(text)
    if not ids:
        raise InputError("prompt.init_text is empty; write a text, or null for a random start")
    length = len(ids) if length is None else length
    return [ids[i % len(ids)] for i in range(length)]


def _drawn(vocab_size: int, length: int, seed: int) -> list[int]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(vocab_size, (length,), generator=generator)]
