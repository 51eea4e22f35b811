"""Reward: the completion does not repeat itself."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field

from rlprompt.rewards.base import Example
from rlprompt.rewards.rules.text import distinct_share, message_texts
from rlprompt.settings import Settings

# Punctuation counts too: "!!!!!!" is a repetition that words alone would not show.
_UNIT = re.compile(r"\w+|[^\w\s]")


class Repetition(Settings):
    """Distinct n-grams / n-grams of the completion, in [0, 1]; 1.0 means nothing is repeated.

    The share of repeated n-grams is that of "Demystifying Long Chain-of-Thought Reasoning"
    (arXiv 2502.03373, appendix C.2), here as a reward that falls from 1 instead of a penalty below
    0. Below 2n units the order is shortened to half of them (at least 1), so that "no no no" is
    seen; an empty completion gets 0.

    A word that repeats letters ("hahaha...") is one word: use `unit: tokens` against it.
    """

    ngram: int = Field(default=3, ge=1)
    """Units per n-gram."""
    unit: Literal["words", "tokens"] = "words"
    """Words and punctuation marks of the text, or the model's tokens."""

    def __call__(
        self, completions: list[Any], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        """One value in [0, 1] per completion."""
        values = []
        for text, ids in zip(message_texts(completions), completion_ids, strict=True):
            units = ids if self.unit == "tokens" else _UNIT.findall(text.lower())
            order = max(1, min(self.ngram, len(units) // 2))
            values.append(distinct_share(units, order) if text.strip() and units else 0.0)
        return values


_QUERY = "What is a glacier?"
EXAMPLES = [
    Example(_QUERY, "A glacier is a slow river of ice that forms where snow stays.", True, 0.9),
    Example(_QUERY, "A glacier is ice. " * 12, False, high=0.2),
    Example(_QUERY, "ice " * 60, False, high=0.1),
    Example(_QUERY, "!" * 60, False, high=0.1),
    Example(_QUERY, "no no no", False, high=0.4),
    Example(_QUERY, "", False, high=0.0),
]
