"""Mutations of trees, texts and bytes by a seeded generator."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, float("inf"),
    float("nan"), "", "x", "a\nb", "\x1b[31m", "../../etc/passwd", "/dev/zero", "/dev/null",
    "~nosuchuser/x", "builtin:", "builtin:length", "os:system", "trl:x", [], {}, [[]], [{}],
    {"type": "soft"}, {"type": None}, {"type": "zzz"}, {"a": {"b": [1]}}, "{server}", "${HOME}",
    "*" * 300, "\u00e9\u202e", "\u2028", ["a", "b"], [1, "a", None], "1e400", "0x10", "1:30", "yes",
    "null", {"": 1}, {"path": "x"}, "a\0b", "..", ".", "a" * 5000, "\U0001f600",
)  # fmt: skip
"""Values that something may stumble over."""

FRAGMENTS = (
    "\t", "\n", "- ", ": ", "{", "}", "[", "]", "&a ", "*a", "!!int ", "!!float ", "!!timestamp ",
    "!!binary ", "!!bool ", "<<: *a\n", "? ", "|\n", ">-\n", "'", '"', "#", "%", "@", "`",
    "\\ud800", "\\U00110000", "\0", "\x85", "\u2028", "1e400", "0x_", "0b", "2024-13-01",
    "190:20:30", "~", "=", "---\n", "...\n", "9" * 4400, "[" * 70, "{a: " * 70, "\u00e9", "\ufeff",
    "\r", "NaN", "1e999", ",", "\\", "null", "\\u0000", "\\udc00",
)  # fmt: skip
"""Pieces of text that mean something to a reader of YAML, JSON or CSV."""


def places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all nodes below the root."""
    if place:
        yield place
    pairs: list[tuple[Any, Any]] = []
    if isinstance(tree, dict):
        pairs = list(tree.items())
    elif isinstance(tree, list):
        pairs = list(enumerate(tree))
    for key, value in pairs:
        yield from places(value, (*place, key))


def mutated_tree(
    tree: Any, draw: random.Random, strange: Sequence[Any] = STRANGE, keys: Sequence[str] = ()
) -> Any:
    """A copy of a tree of dicts and lists with one to three changes."""
    tree = copy.deepcopy(tree)
    new_keys = (*keys, "type", "name", "path", "options", "N", "\n", "", "x")
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        found = list(places(tree))
        if not found:
            break
        place = draw.choice(found)
        node = tree
        for key in place[:-1]:
            node = node[key]
        kind = draw.random()
        if kind < 0.6:
            node[place[-1]] = copy.deepcopy(draw.choice(strange))
        elif kind < 0.7:
            del node[place[-1]]
        elif kind < 0.85 and isinstance(node, dict):
            node[draw.choice(new_keys)] = copy.deepcopy(draw.choice(strange))
        elif isinstance(node, list):
            node.append(copy.deepcopy(draw.choice(strange)))
        else:
            node[place[-1]] = [node[place[-1]]]
    return tree


def mutated_text(text: str, draw: random.Random) -> str:
    """A text with pieces put in, cut out or doubled."""
    letters = list(text)
    for _ in range(draw.randint(1, 5)):
        at = draw.randrange(len(letters) + 1)
        kind = draw.random()
        if kind < 0.6:
            letters[at:at] = draw.choice(FRAGMENTS)
        elif kind < 0.8:
            del letters[at : at + draw.randint(1, 20)]
        elif letters:
            start = draw.randrange(len(letters))
            letters[at:at] = letters[start : start + draw.randint(1, 60)]
    return "".join(letters)


def mutated_bytes(content: bytes, draw: random.Random, first: int | None = None) -> bytes:
    """Bytes with bits turned over, or cut short.

    Args:
        content: bytes to change.
        draw: generator.
        first: bytes at the front among which changes fall; all when None.
    """
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        if not changed:
            break
        at = draw.randrange(min(len(changed), first or len(changed)))
        kind = draw.random()
        if kind < 0.8:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind < 0.9:
            del changed[at:]
        else:
            changed[at:at] = draw.randbytes(draw.randint(1, 16))
    return bytes(changed)


def encoded(text: str) -> bytes:
    """A text in UTF-8, halves of surrogate pairs included."""
    return text.encode("utf-8", "surrogatepass")
