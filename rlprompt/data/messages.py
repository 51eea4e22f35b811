"""From the ways in which datasets write a conversation to one: turns of role and plain text.

Read are `{role, content}` (OpenAI, TRL), `{from, value}` (ShareGPT), and contents that are lists of
text parts (`[{"type": "text", "text": ...}]`), whose texts are joined as chat templates join them.
What has no text (images, calls of tools) is refused with the place of its turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlprompt.errors import InputError
from rlprompt.types import Message

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}
"""Role by what ShareGPT's `from` says."""
SYSTEM_ROLES = ("system", "developer")
"""Roles of the turn whose place the learned prompt takes; `developer` is OpenAI's newer word."""
_STYLES = (("role", "content"), ("from", "value"))


@dataclass(frozen=True)
class Conversation:
    """A conversation of a dataset, its system turn and its answer apart."""

    system: str | None
    """Text of the system turn; None where there is none, or one without text."""
    turns: tuple[Message, ...]
    """User and assistant in turn, the user first and last."""
    answer: str | None
    """The assistant's turn after the last one; None where the conversation ends with the user's."""


def read_conversation(value: list[Any], where: str) -> Conversation:
    """A list of turns, checked.

    Args:
        value: the turns, each a mapping in one of the ways of this module.
        where: the place of the list, for errors.

    Raises:
        InputError: a turn is no such mapping or holds something but text, a system turn is not the
            first, or user and assistant do not alternate from the user's first turn on.
    """
    if not value:
        raise InputError(f"{where} is an empty conversation; add a user turn or remove the row")
    system: str | None = None
    turns: list[Message] = []
    for i, given in enumerate(value):
        place = f"{where} turn {i + 1}"
        role, content = _role_and_content(given, place)
        if i == 0 and role in SYSTEM_ROLES:
            system = read_text(content, place, empty=True).strip() or None
            continue
        _check_role(role, len(turns), place)
        turns.append({"role": role, "content": read_text(content, place)})
    if not turns:
        raise InputError(f"{where} holds a system turn alone; add a user turn or remove the row")
    answer = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
    return Conversation(system, tuple(turns), answer)


def is_message(value: Any) -> bool:
    """Whether a value is a mapping that one of the ways of this module has for a turn."""
    return isinstance(value, dict) and any({*style} <= value.keys() for style in _STYLES)


def read_message(value: Any, where: str) -> Message:
    """One turn as role and text, wherever it stands.

    Raises:
        InputError: it is no mapping in one of the ways of this module, or holds something but text.
    """
    role, content = _role_and_content(value, where)
    role = "system" if role in SYSTEM_ROLES else role
    return {"role": role, "content": read_text(content, where)}


def _role_and_content(turn: Any, where: str) -> tuple[str, Any]:
    style = next((s for s in _STYLES if isinstance(turn, dict) and {*s} <= turn.keys()), None)
    if style is None:
        raise InputError(
            f"{where} is not a message; write a mapping with role and content (or from and value)"
        )
    # Arrow fills the fields that only other turns have with nulls; those say nothing.
    others = [name for name in turn if name not in style and turn[name] is not None]
    if others:
        names = " and ".join(style)
        raise InputError(f"{where} has the field {others[0]!r} besides {names}; remove it")
    role, content = (turn[name] for name in style)
    if style[0] == "role":
        return role if isinstance(role, str) else repr(role), content
    if not isinstance(role, str) or role not in SPEAKERS:
        raise InputError(
            f"{where} is from {role!r}, which is neither human, gpt nor system; only their turns "
            "are read: rewrite it, or remove the row"
        )
    return SPEAKERS[role], content


def _check_role(role: str, position: int, where: str) -> None:
    """The user has the even positions, the assistant the odd ones."""
    if role in SYSTEM_ROLES:
        raise InputError(
            f"{where} is a system turn after others; the learned prompt stands before the first "
            "turn, so remove it from the data"
        )
    expected = ("user", "assistant")[position % 2]
    if role != expected:
        raise InputError(
            f"{where} has the role {role!r} where '{expected}' is due; user and assistant must "
            "alternate, the user first"
        )


def read_text(content: Any, where: str, *, empty: bool = False) -> str:
    """The text of a content: text, or a list of text parts.

    Args:
        content: what a turn holds.
        where: the place of the turn, for errors.
        empty: whether it may hold no text.

    Raises:
        InputError: it holds something else, no text, or half a character.
    """
    text = content
    if isinstance(content, list) and content and all(isinstance(each, dict) for each in content):
        text = "".join(_part(each, where) for each in content)
    elif empty and content is None:
        return ""
    if not isinstance(text, str) or not (empty or text.strip()):
        raise InputError(f"{where} has the content {shown(content)}; it must be non-empty text")
    check_encodable(text, where)
    return text


def _part(part: dict[str, Any], where: str) -> str:
    given = {name: value for name, value in part.items() if value is not None}
    kind = given.pop("type", "text")
    text = given.pop("text", None)
    if kind != "text":
        raise InputError(
            f"{where} has a part of type {kind!r}; only text is read, so remove the part or the row"
        )
    if not isinstance(text, str):
        raise InputError(f"{where} has the part {shown(part)}, which has no text; remove it")
    if given:
        name = next(iter(given))
        raise InputError(f"{where} has a part with the field {name!r} besides its text; remove it")
    return text


def check_encodable(text: str, where: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell and no tokenizer takes.

    Raises:
        InputError: the text has one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} has half of a surrogate pair at character {error.start + 1}; write the "
            "whole character"
        ) from error


def shown(value: Any) -> str:
    """A value in an error message, cut to forty characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
