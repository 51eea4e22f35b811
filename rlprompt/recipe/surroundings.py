"""Whether a prompt can stand where the augment section of a recipe puts it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlprompt.data.augment import AugmentSettings
from rlprompt.errors import InputError
from rlprompt.prompts.base import Prompt, SlotPrompt
from rlprompt.prompts.surroundings import NotApplicableError, asked_under


def surrounding(augment: Sequence[AugmentSettings]) -> Iterator[tuple[int, AugmentSettings]]:
    """Entries that put other text beside the prompt, with their places in the section.

    Args:
        augment: entries of the section.
    """
    for place, entry in enumerate(augment):
        if entry.situation.places:
            yield place, entry


def check_surroundings(
    augment: Sequence[AugmentSettings], kind: type[Prompt], *, is_search: bool
) -> None:
    """Refuse what can be seen from the recipe alone.

    Args:
        augment: entries of the section.
        kind: class of the prompt that is trained.
        is_search: whether the prompt is searched for.

    Raises:
        ValueError: it says which entry cannot be, and why.
    """
    for place, entry in surrounding(augment):
        where = f"augment.{place}.situation.type is {entry.situation.type}"
        if is_search:
            raise ValueError(
                f"{where}, which puts text beside a prompt that learns by gradients, and search "
                "asks every query under its candidates alone; remove the entry"
            )
        if not issubclass(kind, SlotPrompt):
            raise ValueError(
                f"{where}, and a prompt of type {kind.kind} takes the whole system turn, so no "
                "other text can stand beside it; remove the entry, or choose prompt.type: soft"
            )


def surrounded_prompts(augment: Sequence[AugmentSettings], prompt: Prompt) -> list[Prompt]:
    """The prompt in each place that the section puts it into.

    Args:
        augment: entries of the section.
        prompt: prompt that is trained.

    Raises:
        InputError: it cannot stand in one of them.
    """
    found: list[Prompt] = []
    for place, entry in surrounding(augment):
        try:
            found += [asked_under(prompt, each, is_trained=True) for each in entry.situation.places]
        except NotApplicableError as error:
            raise InputError(f"augment.{place}.situation: {error}") from error
    return found
