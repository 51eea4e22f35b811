"""How alike prompts are: as tensors, by what they do, and on the way from one to the other.

Letters: m virtual tokens, d model width.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlprompt.certify.comparison import paired_difference
from rlprompt.interpret.clock import Slice
from rlprompt.interpret.subject import Subject
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.prefix import PrefixPrompt
from rlprompt.prompts.soft import SoftPrompt

STEPS = (0.25, 0.5, 0.75)
"""Places between two prompts: 0 is the inspected one."""
MOST_SUMS = 2
"""Ordered pairs of other prompts whose difference is added to the inspected one."""


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
    if not _same_place(one, other):
        return None
    return _like(one, torch.lerp(a, b.to(a), weight))


def added(one: Prompt, plus: Prompt, minus: Prompt) -> Prompt | None:
    """The prompt one + plus - minus, of three of one kind and shape; None where there is none.

    Args:
        one: the prompt that is changed.
        plus: what is added.
        minus: what is taken away.
    """
    a, b, c = (tensor_of(each) for each in (one, plus, minus))
    if a is None or b is None or c is None or not a.shape == b.shape == c.shape:
        return None
    if not (type(one) is type(plus) is type(minus)):
        return None
    if not (_same_place(one, plus) and _same_place(one, minus)):
        return None
    return _like(one, a + (b.to(a) - c.to(a)))


def moved_at_random(one: Prompt, plus: Prompt, minus: Prompt, seed: int) -> Prompt | None:
    """The control of `added`: as far away, in a random direction; None where there is none.

    Args:
        one: the prompt that is changed.
        plus: what would be added.
        minus: what would be taken away.
        seed: seed of the direction.
    """
    whole = added(one, plus, minus)
    own = tensor_of(one)
    if whole is None or own is None:
        return None
    ended = tensor_of(whole)
    assert ended is not None
    step = ended - own
    drawn = torch.randn(step.shape, generator=torch.Generator().manual_seed(seed)).to(step)
    norms = drawn.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return _like(one, own + drawn * step.norm(dim=-1, keepdim=True) / norms)


def _same_place(one: Prompt, other: Prompt) -> bool:
    """Whether keys were made at the same positions; embeddings have none."""
    if isinstance(one, PrefixPrompt) and isinstance(other, PrefixPrompt):
        return one.position == other.position
    return True


def _like(one: Prompt, made: Tensor) -> Prompt:
    """A prompt of the kind and the place of another."""
    return PrefixPrompt(made, one.position) if isinstance(one, PrefixPrompt) else SoftPrompt(made)


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


def sums(subject: Subject, time: Slice) -> list[dict[str, Any]]:
    """What becomes of the inspected prompt p when the difference of two others is added: p + q - r.

    Beside each stands what the difference is by itself, in reward (q against r), and a control: p
    moved as far in a random direction.

    Args:
        subject: what is inspected, with at least two others in `given`.
        time: time that there is; without it, what follows is left out.

    Returns:
        Rows with `plus` and `minus` (names), `kl` and `control_kl` from p (nats per token), and
        `change`, `control_change` and `difference` in reward (value, low, high, outcome), None
        where no reward is known.
    """
    yardstick = subject.yardstick("test")
    rows: list[dict[str, Any]] = []
    for plus, minus in permutations(subject.given, 2):
        q, r = subject.given[plus], subject.given[minus]
        made = added(subject.prompt, q, r)
        control = moved_at_random(subject.prompt, q, r, subject.seed)
        if made is None or control is None:
            continue
        if len(rows) >= MOST_SUMS or time.is_over:
            break
        rows.append(
            {
                "plus": plus,
                "minus": minus,
                "kl": yardstick.pooled(yardstick.kl(made)),
                "control_kl": yardstick.pooled(yardstick.kl(control)),
                "change": _change(subject, made, subject.prompt),
                "control_change": _change(subject, control, subject.prompt),
                "difference": _change(subject, q, r),
            }
        )
    return rows


def _change(subject: Subject, new: Prompt, old: Prompt) -> dict[str, Any] | None:
    """Reward of one prompt against another's, by query; None without rewards."""
    after, before = subject.scores(new), subject.scores(old)
    if after is None or before is None:
        return None
    found = paired_difference(after, before, num_compared=3 * MOST_SUMS)
    ends = found.interval
    return {"value": ends.value, "low": ends.low, "high": ends.high, "outcome": found.outcome}
