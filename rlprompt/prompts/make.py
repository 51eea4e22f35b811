"""From settings to a prompt: every representation a recipe can name, and what an artifact holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from rlprompt.errors import InputError
from rlprompt.prompts.base import Conditioner, Loader, Prompt, PromptSettings
from rlprompt.prompts.sequence import SequencePrompt, SequenceSettings
from rlprompt.prompts.single import SINGLE
from rlprompt.settings import OneOf
from rlprompt.user_code import load_class

PROMPTS: Mapping[str, type[Prompt]] = {**SINGLE, "sequence": SequencePrompt}
"""The built-in representations: what `prompt.type` and an artifact say -> the class."""

DEFAULT = "soft"
"""The representation of a prompt without a `type`."""

AnyPromptSettings = Annotated[
    PromptSettings,
    OneOf({name: each.Settings for name, each in PROMPTS.items()}, default=DEFAULT),
]


def prompt_class(settings: PromptSettings) -> type[Prompt]:
    """The representation that settings choose."""
    kind: type[Prompt] = settings.user_class or PROMPTS[settings.type]
    return kind


def make_prompt(
    settings: PromptSettings, conditioner: Conditioner, seed: int, load: Loader
) -> Prompt:
    """The prompt that a recipe describes; arguments and errors are those of `Prompt.create`."""
    return prompt_class(settings).create(settings, conditioner, seed, load)


def own_classes(settings: PromptSettings) -> dict[str, type[Prompt]]:
    """The classes of the user's own that settings name, in a sequence's parts too, by path."""
    parts = settings.parts if isinstance(settings, SequenceSettings) else ()
    named = {each.type: each.user_class for each in (settings, *parts)}
    return {path: each for path, each in named.items() if each is not None}


def named_classes(names: Iterable[type[Prompt] | str]) -> list[type[Prompt]]:
    """The classes of the user's own that somebody names to read an artifact.

    Args:
        names: the classes, or their paths, which are relative to the working directory.

    Raises:
        InputError: see `load_prompt_class`.
    """
    return [
        load_prompt_class(each, Path.cwd()) if isinstance(each, str) else each for each in names
    ]


def load_prompt_class(path: str, base_dir: Path) -> type[Prompt]:
    """The representation of the user's own that a path names.

    Args:
        path: a path as `rlprompt.user_code.load_object` takes it.
        base_dir: folder that file paths are relative to.

    Raises:
        InputError: see `rlprompt.user_code.load_class`; or artifacts could not tell it from a
            built-in one.
    """
    found: type[Prompt] = load_class(path, base_dir, Prompt)
    kind = getattr(found, "kind", "")
    if not kind or kind in PROMPTS:
        raise InputError(
            f"{path} has the kind {kind!r}; write `kind = ` with a name of its own, for its "
            "artifacts"
        )
    return found
