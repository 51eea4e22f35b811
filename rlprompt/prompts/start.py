"""Token ids that a fresh prompt starts from."""

from __future__ import annotations

import torch

from rlprompt.errors import InputError
from rlprompt.prompts.base import Conditioner


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
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(conditioner.vocab_size, (length,), generator=generator)
        return [int(token) for token in drawn]
    ids = conditioner.slot_ids(text)
    if not ids:
        raise InputError("prompt.init_text is empty; write a text, or null for a random start")
    length = len(ids) if length is None else length
    return [ids[i % len(ids)] for i in range(length)]
