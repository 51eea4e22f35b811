"""How alike prompts are: as tensors, by what they do, and on the way from one to the other.

Letters: m virtual tokens, d model width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlprompt.interpret.clock import Slice
from rlprompt.interpret.subject import Subject
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.prefix import PrefixPrompt
from rlprompt.prompts.soft import SoftPrompt

STEPS = (0.25, 0.5, 0.75)
"""Places between two prompts: 0 is the inspected one."""


def tensor_of(prompt: Prompt) -> Tensor | None:
    """What a prompt is made of, detached: vectors [m, d], or keys and values; None of other kinds.

    Args:
        prompt: the prompt.
    """
    if isinstance(prompt, SoftPrompt):
        return prompt.embeddings.detach()
    if isinstance(prompt, PrefixPrompt):
        return prompt.keys_values().detach()
    return None


def between(one: Prompt, other: Prompt, weight: float) -> Prompt | None:
    """The prompt on the straight line between two of one kind and shape; None where there is none.

    Args:
        one: the prompt at weight 0.
        other: the prompt at weight 1.
        weight: place between them.
    """
    a, b = tensor_of(one), tensor_of(other)
    if a is None or b is None or type(one) is not type(other) or a.shape != b.shape:
        return None
    mixed = torch.lerp(a, b.to(a), weight)
    if isinstance(one, PrefixPrompt) and isinstance(other, PrefixPrompt):
        return PrefixPrompt(mixed, one.position) if one.position == other.position else None
    return SoftPrompt(mixed)


def cosine(one: Prompt, other: Prompt) -> float | None:
    """Mean cosine of what stands at the same places; None of prompts of other kinds or shapes.

    Args:
        one: a prompt.
        other: another.
    """
    a, b = tensor_of(one), tensor_of(other)
    if a is None or b is None or type(one) is not type(other) or a.shape != b.shape:
        return None
    return float(torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1).mean())


def compared(subject: Subject, time: Slice) -> list[dict[str, Any]]:
    """Each other artifact's prompt against the inspected one, on test queries.

    Args:
        subject: what is inspected, with the others in `given`.
        time: time that there is; without it, the way between is left out.

    Returns:
        Rows with `name`, `kind`, `cosine`, `kl` (nats per token, 0 = the same behaviour),
        `base_kl` (the same of no prompt), and `path`: KL and reward at the places of `STEPS`.
    """
    yardstick = subject.yardstick("test")
    base = yardstick.pooled(yardstick.kl(subject.base))
    rows = []
    for name, prompt in subject.given.items():
        path = []
        for weight in STEPS:
            mixed = between(subject.prompt, prompt, weight)
            if mixed is None or time.is_over:
                break
            rewards = subject.reward_means(mixed)
            path.append(
                {
                    "weight": weight,
                    "kl": yardstick.pooled(yardstick.kl(mixed)),
                    "reward": None if rewards is None else float(np.nanmean(rewards)),
                }
            )
        rows.append(
            {
                "name": name,
                "kind": prompt.kind,
                "cosine": cosine(subject.prompt, prompt),
                "kl": yardstick.pooled(yardstick.kl(prompt)),
                "base_kl": base,
                "path": path,
            }
        )
    return rows
