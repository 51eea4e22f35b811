"""Which prompts are input embeddings and nothing else, and these embeddings.

A program that takes input embeddings, such as vLLM, can read such a prompt before any
conversation.

Letters: m virtual tokens, d model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlprompt.prompts.base import Conditioner, EmbeddedPrompt, Prompt
from rlprompt.prompts.sequence import SequencePrompt


def is_embedded(prompt: Prompt) -> bool:
    """Whether a prompt, or each part of it, is input embeddings and nothing else.

    Args:
        prompt: prompt of any kind.
    """
    if isinstance(prompt, SequencePrompt):
        return all(is_embedded(part) for part in prompt.parts)
    # A class derived from it may make another prefix.
    own = getattr(prompt.prefix, "__func__", None)
    return isinstance(prompt, EmbeddedPrompt) and own is EmbeddedPrompt.prefix


def slot_embeddings(prompt: Prompt, conditioner: Conditioner) -> Tensor:
    """The input embeddings [m, d] of the slot, in the base's dtype.

    Args:
        prompt: prompt that is input embeddings.
        conditioner: the base and its chat template.

    Raises:
        ValueError: the prompt is more than that.
    """
    return torch.cat(_parts(prompt, conditioner)).contiguous()


def _parts(prompt: Prompt, conditioner: Conditioner) -> list[Tensor]:
    if isinstance(prompt, SequencePrompt):
        return [each for part in prompt.parts for each in _parts(part, conditioner)]
    if not isinstance(prompt, EmbeddedPrompt):
        raise ValueError(f"a {prompt.kind} prompt is more than input embeddings")
    return [prompt.input_embeddings(conditioner)[len(conditioner.head_ids) :]]
