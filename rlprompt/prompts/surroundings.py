"""A prompt among other text in the system turn."""

from __future__ import annotations

from rlprompt.errors import InputError
from rlprompt.prompts.base import Prompt, SlotPrompt
from rlprompt.prompts.prefix import PrefixPrompt
from rlprompt.prompts.sequence import SequencePrompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.types import Surroundings


class NotApplicableError(InputError):
    """A situation that a prompt of this kind cannot be put into."""


def surrounded(prompt: Prompt, around: Surroundings) -> Prompt:
    """A prompt with other text around it, which shares its parameters.

    Texts are joined with a blank line between them, as people write them; learned vectors stand
    directly beside the text.

    Args:
        prompt: the prompt; the base without one gets the other text alone.
        around: the other text, at least one side of it not empty.

    Raises:
        NotApplicableError: a prompt of this kind cannot stand there.
    """
    before, after = around.before, around.after
    if isinstance(prompt, NonePrompt | TextPrompt):
        own = "" if isinstance(prompt, NonePrompt) else prompt.init_text
        return TextPrompt("\n\n".join(text for text in (before, own, after) if text))
    if not isinstance(prompt, SlotPrompt):
        raise NotApplicableError(
            f"a prompt of type {prompt.kind} takes the whole system turn, so no other text can "
            "stand beside it; leave the situation out"
        )
    parts = list(prompt.parts) if isinstance(prompt, SequencePrompt) else [prompt]
    if before and any(isinstance(part, PrefixPrompt) for part in parts):
        raise NotApplicableError(
            "the keys of a prompt of type prefix belong to the first places of the system turn, so "
            "no text can stand before it; use after"
        )
    texts = [TextPrompt(before)] if before else []
    trained = prompt.train if isinstance(prompt, SequencePrompt) else 0
    ends = [TextPrompt(after)] if after else []
    return SequencePrompt([*texts, *parts, *ends], len(texts) + trained)


def asked_under(prompt: Prompt, around: Surroundings | None, *, is_trained: bool) -> Prompt:
    """The prompt that a query is asked under.

    Args:
        prompt: the prompt that is trained, a reference or a teacher.
        around: what the query says of the text beside it (`Query.around`).
        is_trained: whether it is the one that is trained, which alone stands in frames.

    Raises:
        NotApplicableError: see `surrounded`.
    """
    if around is None or (around.is_frame and not is_trained):
        return prompt
    return surrounded(prompt, around)
