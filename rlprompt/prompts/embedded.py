"""Which prompts are input embeddings and nothing else, and those of their slot.

Letters: m virtual tokens, d model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlprompt.prompts.base import Conditioner, EmbeddedPrompt, Prompt
from rlprompt.prompts.sequence import SequencePrompt


def is_embedded(prompt: Prompt) -> bool:
    """Whether a prompt is input embeddings, and nothing else.

    Args:
        prompt: prompt of any kind; a sequence is where each of its parts is.
    """
    if isinstance(prompt, SequencePrompt):
        return all(is_embedded(part) for part in prompt.parts)
    # A class derived from it may make another prefix.
    own = getattr(prompt.prefix, "__func__", None)
    return isinstance(prompt, EmbeddedPrompt) and own is EmbeddedPrompt.prefix


def slot_embeddings(prompt: Prompt, conditioner: Conditioner) -> Tensor:
    """The slot's input embeddings [m, d], in the base's dtype.

    Args:
        prompt: prompt of which `is_embedded` is true, and which stands behind the template's head.
        conditioner: the base and its chat template.

    Raises:
        ValueError: the prompt is more than that.
    """
    return torch.cat(_pieces(prompt, conditioner)).contiguous()


def _pieces(prompt: Prompt, conditioner: Conditioner) -> list[Tensor]:
    if isinstance(prompt, SequencePrompt):
        return [each for part in prompt.parts for each in _pieces(part, conditioner)]
    if not isinstance(prompt, EmbeddedPrompt):
        raise ValueError(f"a {prompt.kind} prompt is more than input embeddings")
    return [prompt.input_embeddings(conditioner)[len(conditioner.head_ids) :]]
