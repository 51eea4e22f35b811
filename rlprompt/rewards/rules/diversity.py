"""Reward: the completion differs from its siblings, the other completions of the same query."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from rlprompt.rewards.base import Example
from rlprompt.rewards.rules.group import PerGroup
from rlprompt.settings import Settings

_WORD = re.compile(r"\w+|[^\w\s]")


class Diversity(Settings):
    """1 - mean Jaccard similarity of word n-grams to the siblings, in [0, 1].

    1.0 = shares nothing with any sibling, 0.0 = all are the same. As a metric it shows a policy
    that collapses to one answer; as a small score it works against that. An empty completion gets
    0; a completion without siblings cannot be scored.
    """

    ngram: int = Field(default=2, ge=1)
    """Words and punctuation marks per n-gram."""
    max_words: int = Field(default=400, ge=1)
    """Only this many units from the start are compared."""

    def __call__(
        self, prompts: list[Any], completions: list[Any], group_index: list[int], **kwargs: Any
    ) -> list[float | None]:
        """One value in [0, 1] or None per completion."""
        return PerGroup(self._values)(prompts, completions, group_index)

    def _values(self, query: str, texts: Sequence[str]) -> list[float | None]:
        if len(texts) < 2:
            return [None] * len(texts)
        sets = [self._ngrams(text) for text in texts]
        return [
            1.0
            - sum(_jaccard(mine, other) for j, other in enumerate(sets) if j != i) / (len(sets) - 1)
            if mine
            else 0.0
            for i, mine in enumerate(sets)
        ]

    def _ngrams(self, text: str) -> frozenset[tuple[str, ...]]:
        units = _WORD.findall(text.lower())[: self.max_words]
        order = min(self.ngram, len(units))
        starts = range(len(units) - order + 1) if order else range(0)
        return frozenset(tuple(units[start : start + order]) for start in starts)


def _jaccard(left: frozenset[Any], right: frozenset[Any]) -> float:
    union = len(left | right)
    return len(left & right) / union if union else 1.0


_QUERY = "Suggest a weekend activity."
EXAMPLES = [
    Example(_QUERY, "Bake a loaf of rye bread.", True, 0.9),
    Example(_QUERY, "You could visit the science museum.", True, 0.9),
    Example(_QUERY, "Take a long walk in the park.", False, high=0.85),
    Example(_QUERY, "Take a long walk in the park!", False, high=0.85),
    Example(_QUERY, "", False, high=0.0),
]
