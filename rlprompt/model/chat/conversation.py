"""What the slot takes as a conversation: checked turns of user and assistant, and clean text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlprompt.errors import InputError
from rlprompt.types import Message

_KEYS = ("role", "content")


def contents_of(messages: Sequence[Message]) -> list[str]:
    """The checked contents of turns user, assistant, ..., user.

    Raises:
        InputError: The messages are not such turns, or hold more than role and content.
    """
    if not messages:
        raise InputError("A query has no messages; give it at least one user message.")
    for index, message in enumerate(messages):
        role = message.get("role")
        if role == "system":
            raise InputError(
                f"Message {index} of a query has the role system, which is the learned prompt's "
                "place; remove it from the query."
            )
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            raise InputError(
                f"Message {index} of a query has the role {role!r} where {expected!r} is due; let "
                "user and assistant take turns, the user first."
            )
        extra = sorted(k for k, v in message.items() if k not in _KEYS and v is not None)
        if extra:
            raise InputError(
                f"Message {index} of a query has the key {extra[0]!r}, which the slot does not "
                "render; keep role and content only."
            )
    if len(messages) % 2 == 0:
        raise InputError(
            "A query ends with an assistant message, so there is nothing to answer; end it with a "
            "user message."
        )
    return [checked_text(m.get("content"), f"Message {i}") for i, m in enumerate(messages)]


def checked_text(text: Any, name: str) -> str:
    """The text itself; `name` opens the sentence about what is wrong with it.

    Raises:
        InputError: It is no string, or cannot be encoded.
    """
    if not isinstance(text, str):
        raise InputError(f"{name} has content of type {type(text).__name__}; make it a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} holds half of a surrogate pair at character {error.start}, which is no text; "
            "decode the data again or remove it."
        ) from error
    return text
