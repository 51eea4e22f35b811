"""Small questions about the pieces of a rendered template, which `slot` asks."""

from __future__ import annotations

from rlprompt.model.chat.template import Hole, Layout
from rlprompt.model.chat.tokenization import Control, Pieces


def hole_position(layout: Layout, index: int) -> int:
    """Where the hole of a content (or SYSTEM) stands among a layout's parts."""
    parts = enumerate(layout.parts)
    return next(i for i, part in parts if isinstance(part, Hole) and part.index == index)


def last_control(pieces: Pieces) -> Control | None:
    """The last control token; None without one."""
    return next((piece for piece in reversed(pieces) if isinstance(piece, Control)), None)


def through_control(pieces: Pieces) -> Pieces:
    """The pieces without the text after the last control token."""
    return pieces[:-1] if pieces and isinstance(pieces[-1], str) else pieces


def added_text(none: str, head: str, turn_break: str) -> str:
    """What a template writes only when no system message is given."""
    rest = none[shared_length(none, head) :]
    return rest[: len(rest) - shared_length(rest[::-1], turn_break[::-1])]


def shared_length(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
