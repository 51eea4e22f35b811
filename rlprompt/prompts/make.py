"""From settings to a prompt: every representation a recipe can name, and what an artifact holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import torch
from pydantic import Field

from rlprompt.errors import InputError
from rlprompt.prompts.adapter import AdapterPrompt, AdapterSettings
from rlprompt.prompts.base import Conditioner, Prompt, SavedPrompt, SlotPrompt
from rlprompt.prompts.prefix import PrefixPrompt, PrefixSettings
from rlprompt.prompts.sequence import SequencePrompt, SequenceSettings
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.prompts.text import TextPrompt, TextSettings
from rlprompt.types import PrefixKV

PromptSettings = Annotated[
    SoftSettings | PrefixSettings | TextSettings | AdapterSettings | SequenceSettings,
    Field(discriminator="type"),
]

PROMPTS: Mapping[str, Callable[[SavedPrompt], Prompt]] = {
    "soft": SoftPrompt.restore,
    "prefix": PrefixPrompt.restore,
    "text": TextPrompt.restore,
    "adapter": AdapterPrompt.restore,
    "sequence": SequencePrompt.restore,
}
"""Every representation that an artifact can hold, and what restores it."""

Loader = Callable[[str], Prompt]
"""The prompt of the artifact at a path of a recipe."""


def make_prompt(
    settings: PromptSettings, conditioner: Conditioner, seed: int, load: Loader
) -> Prompt:
    """A prompt as a recipe describes it, before training.

    Args:
        settings: the settings of any representation.
        conditioner: the base.
        seed: the seed of what is drawn.
        load: what reads the prompt that `from_artifact` names.

    Raises:
        InputError: it cannot be made on this base, or not from that artifact.
    """
    if isinstance(settings, SequenceSettings):
        return _sequence(settings, conditioner, seed, load)
    return _single(settings, conditioner, seed, load, None)


def _single(
    settings: SoftSettings | PrefixSettings | TextSettings | AdapterSettings,
    conditioner: Conditioner,
    seed: int,
    load: Loader,
    before: PrefixKV | None,
) -> Prompt:
    if isinstance(settings, TextSettings):
        return TextPrompt.create(settings, conditioner, seed)
    warm = None if settings.from_artifact is None else load(settings.from_artifact)
    if isinstance(settings, PrefixSettings):
        return PrefixPrompt.create(settings, conditioner, seed, warm, before)
    if isinstance(settings, AdapterSettings):
        return AdapterPrompt.create(settings, conditioner, seed, warm)
    return SoftPrompt.create(settings, conditioner, seed, warm)


def _sequence(
    settings: SequenceSettings, conditioner: Conditioner, seed: int, load: Loader
) -> SequencePrompt:
    if settings.from_artifact is not None:
        warm = load(settings.from_artifact)
        if not isinstance(warm, SequencePrompt):
            raise InputError(
                f"prompt.from_artifact holds a {warm.kind} prompt, not a sequence; name it as one "
                "of prompt.parts"
            )
        return SequencePrompt(warm.parts, warm.train if settings.train is None else settings.train)
    before = conditioner.head_prefix()
    parts: list[SlotPrompt] = []
    for part_settings in settings.parts:
        part = _single(part_settings, conditioner, seed, load, before)
        assert isinstance(part, SlotPrompt)  # PartSettings names no other
        with torch.no_grad():
            before = part.extend(conditioner, before)
        parts.append(part)
    return SequencePrompt(parts, len(parts) - 1 if settings.train is None else settings.train)
