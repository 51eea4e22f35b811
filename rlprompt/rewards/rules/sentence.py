"""Reward: the completion ends like a finished text, so that cut-off answers cannot win."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rlprompt.rewards.base import Example
from rlprompt.rewards.rules.text import ends_complete, message_texts, words
from rlprompt.settings import Settings


class Sentence(Settings):
    """1.0 when the completion ends with a complete sentence (or a closed code fence), else 0.0.

    A rule on punctuation: it cannot tell a grammatical sentence from words with a full stop.
    """

    min_words: int = Field(default=3, ge=1)
    """A completion with fewer words in all gets 0, so a lone full stop earns nothing."""

    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """1.0 or 0.0 per completion."""
        return [
            float(
                len(words(text)) >= self.min_words and ends_complete(text, min(2, self.min_words))
            )
            for text in message_texts(completions)
        ]


_QUERY = "Why is the sky blue?"
EXAMPLES = [
    Example(_QUERY, "Air scatters blue light most.", True, 1.0),
    Example(_QUERY, 'He said: "Air scatters blue light most."', True, 1.0),
    Example(_QUERY, "Air scatters blue light most! \U0001f3f4\u200d\u2620\ufe0f", True, 1.0),
    Example(_QUERY, "Because air scatters blue light more than", False, high=0.0),
    Example(_QUERY, "There are three reasons:\n1. Air scatters it.\n2.", False, high=0.0),
    Example(_QUERY, "Because air scatters...", False, high=0.0),
    Example(_QUERY, ".", False, high=0.0),
    Example(_QUERY, "a. b. c.", False, high=0.0),
    Example(_QUERY, "", False, high=0.0),
]
