"""Edits of a system text that need no model: whole phrases, and single words.

A phrase is a sentence or a line with the white space behind it, so the phrases of a text are the
text. All functions are pure: they draw from the generator that they are given, and return None
where there is nothing to edit.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

_PHRASE = re.compile(
    r".+?(?:[.!?;]+[\"')\]]*(?=\s|\Z)\s*|[\u3002\uff01\uff1f\uff1b]+\s*|\n\s*|\Z)", re.DOTALL
)
_WORD = re.compile(r"\S+")
_UNSPACED_ENDS = "\u3002\uff01\uff1f\uff1b"
"""Ends of sentences in scripts that put no space behind them."""


def phrases(text: str) -> list[str]:
    """The sentences and lines of a text, each with the white space behind it."""
    return _PHRASE.findall(text)


def joined(parts: Sequence[str]) -> str:
    """Phrases as a text: with a space where they would run into each other, and none around."""
    text = ""
    for part in parts:
        if text and part.strip() and not text[-1].isspace() and text[-1] not in _UNSPACED_ENDS:
            text += " "
        text += part
    return tidy(text)


def tidy(text: str) -> str:
    """A text without spaces at the ends of its lines, runs of spaces, and empty lines in a row."""
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def delete(text: str, draw: random.Random) -> str | None:
    """The text without one of its phrases, or without a word where it has one phrase."""
    parts = phrases(text)
    if len(parts) > 1:
        del parts[draw.randrange(len(parts))]
        return joined(parts)
    words = _WORD.findall(text)
    if len(words) < 2:
        return None
    del words[draw.randrange(len(words))]
    return " ".join(words)


def swap(text: str, draw: random.Random) -> str | None:
    """The text with two of its phrases exchanged, or two neighbouring words of its one phrase."""
    parts = phrases(text)
    if len(parts) > 1:
        one, other = draw.sample(range(len(parts)), 2)
        parts[one], parts[other] = parts[other], parts[one]
        return joined(parts)
    words = _WORD.findall(text)
    if len(words) < 2:
        return None
    place = draw.randrange(len(words) - 1)
    words[place : place + 2] = [words[place + 1], words[place]]
    return " ".join(words)


def repeat(text: str, draw: random.Random) -> str | None:
    """The text with one of its phrases said again at the end."""
    parts = phrases(text)
    return joined([*parts, draw.choice(parts)]) if parts else None


def substitute(text: str, others: Sequence[str], draw: random.Random) -> str | None:
    """The text with one of its phrases replaced by a phrase of another text.

    Args:
        text: text to edit.
        others: texts to take a phrase from.
        draw: generator.
    """
    parts = phrases(text)
    pool = sorted({each.strip() for other in others for each in phrases(other)} - {""})
    if not parts or not pool:
        return None
    place = draw.randrange(len(parts))
    ends = re.search(r"\s*\Z", parts[place])
    parts[place] = draw.choice(pool) + (ends.group() if ends else "")
    return joined(parts)


def insert(text: str, phrase: str, draw: random.Random) -> str:
    """The text with a phrase more, before, between or behind its own."""
    parts = phrases(text)
    parts.insert(draw.randint(0, len(parts)), phrase)
    return joined(parts)


def change_word(text: str, others: Sequence[str], draw: random.Random) -> str | None:
    """The text with one word left out, moved, or replaced by a word of another text.

    Args:
        text: text to edit.
        others: texts to take a word from.
        draw: generator.
    """
    words = list(_WORD.finditer(text))
    if len(words) < 2:
        return None
    place = draw.choice(words)
    before, after = text[: place.start()], text[place.end() :]
    kind = draw.choice(("leave out", "move", "replace"))
    if kind == "leave out":
        return tidy(before + after)
    if kind == "move":
        rest = _WORD.findall(before + after)
        rest.insert(draw.randint(0, len(rest)), place.group())
        return " ".join(rest)
    pool = sorted({word for other in others for word in _WORD.findall(other)} - {place.group()})
    return tidy(before + draw.choice(pool) + after) if pool else None


def cross(one: str, other: str, draw: random.Random) -> str | None:
    """A text of two: phrase by phrase from either where they have as many, else head and tail."""
    ones, others = phrases(one), phrases(other)
    if not ones or not others:
        return None
    if len(ones) == len(others):
        return joined([draw.choice(pair).strip() for pair in zip(ones, others, strict=True)])
    head = ones[: draw.randint(0, len(ones))]
    tail = others[draw.randint(0, len(others)) :]
    return joined([*head, *tail]) or None
