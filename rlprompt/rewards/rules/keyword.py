"""Reward: words or patterns that must, may or must not occur."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from pydantic import Field, model_validator

from rlprompt.errors import InputError
from rlprompt.rewards.base import Example
from rlprompt.rewards.rules.text import message_texts, words
from rlprompt.settings import Settings


class Keyword(Settings):
    """Presence of keywords, in [0, 1]; how often one occurs never counts.

    value = found * 0.5 ** (distinct forbidden ones present) * min(1, max_density / density),
    where found is the mean of the parts that are set: 1 or 0 for `any_of`, the share that occurs
    for `all_of` (1 when neither is set and the completion is not empty), and density is the share
    of the completion's words that lie in a required match. The last factor keeps a bare list of
    the keywords from being the best answer.
    """

    any_of: list[str] = Field(default_factory=list)
    """At least one must occur."""
    all_of: list[str] = Field(default_factory=list)
    """Each must occur."""
    none_of: list[str] = Field(default_factory=list)
    """None may occur."""
    regex: bool = False
    """Read the entries as regular expressions instead of whole words."""
    ignore_case: bool = True
    """Take upper and lower case as equal."""
    max_density: float = Field(default=0.34, gt=0.0, le=1.0)
    """Share of words inside matches above which the value falls."""

    @model_validator(mode="after")
    def _check_entries(self) -> Keyword:
        entries = [*self.any_of, *self.all_of, *self.none_of]
        if not entries:
            raise InputError("set any_of, all_of or none_of: without keywords nothing is scored")
        for entry in entries:
            try:
                matches_nothing = self._compile(entry).search("") is not None
            except re.error as error:
                raise InputError(f"keyword pattern {entry!r} is not valid: {error}") from error
            if matches_nothing or not entry.strip():
                raise InputError(f"keyword {entry!r} matches an empty text; write a longer one")
        return self

    @cached_property
    def _patterns(self) -> tuple[list[re.Pattern[str]], ...]:
        lists = (self.any_of, self.all_of, self.none_of)
        return tuple([self._compile(entry) for entry in entries] for entries in lists)

    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """One value in [0, 1] per completion."""
        return [self._value(text) for text in message_texts(completions)]

    def _compile(self, entry: str) -> re.Pattern[str]:
        flags = re.IGNORECASE if self.ignore_case else 0
        return re.compile(entry if self.regex else rf"(?<!\w){re.escape(entry)}(?!\w)", flags)

    def _value(self, text: str) -> float:
        if not text.strip():
            return 0.0
        any_of, all_of, none_of = self._patterns
        parts = []
        if any_of:
            parts.append(float(any(pattern.search(text) for pattern in any_of)))
        if all_of:
            parts.append(sum(bool(pattern.search(text)) for pattern in all_of) / len(all_of))
        found = sum(parts) / len(parts) if parts else 1.0
        forbidden = sum(bool(pattern.search(text)) for pattern in none_of)
        density = _matched_words(text, [*any_of, *all_of]) / max(1, len(words(text)))
        return found * 0.5**forbidden * min(1.0, self.max_density / max(density, 1e-9))


def _matched_words(text: str, patterns: list[re.Pattern[str]]) -> int:
    spans = sorted(match.span() for pattern in patterns for match in pattern.finditer(text))
    count, covered = 0, 0
    for start, end in spans:  # merged, so that overlapping patterns count a word once
        if end > covered:
            count += len(words(text[max(start, covered) : end]))
            covered = end
    return count


_QUERY = "How do I make tea?"
_TEA = {"all_of": ["boil", "water"], "any_of": ["cup", "mug"], "none_of": ["coffee"]}
EXAMPLES = [
    Example(_QUERY, "Boil the water and pour it into a mug with leaves.", True, 1.0, options=_TEA),
    Example(_QUERY, "Boil the water and pour it over leaves.", False, 0.5, 0.5, options=_TEA),
    Example(
        _QUERY, "Boil water for a cup of tea or coffee at home.", False, 0.5, 0.5, options=_TEA
    ),
    Example(_QUERY, "boil water cup", False, high=0.4, options=_TEA),
    Example(_QUERY, "boil water mug " * 20, False, high=0.4, options=_TEA),
    Example(_QUERY, "Just buy some.", False, high=0.0, options=_TEA),
    Example(_QUERY, "", False, high=0.0, options=_TEA),
]
