"""Reward: the completion is the right label (classification)."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from pydantic import Field, model_validator

from rlprompt.errors import InputError
from rlprompt.rewards.base import Example
from rlprompt.rewards.rules.text import message_texts, words
from rlprompt.settings import Settings


class Exact(Settings):
    """How directly the completion gives the label of its row's column, in [0, 1].

    Labels are compared as lower-cased words, without punctuation. The value is
    1.0 when the first line is the label; 0.9 when the completion begins with it;
    partial * min(1, 8 / words) when it occurs later; 0.0 otherwise. A completion that also names
    another of `labels` gets at most `partial` when it begins with the right one, and 0 otherwise,
    because naming every label is the cheapest way to name the right one. A row whose column is
    None cannot be scored.
    """

    column: str = "label"
    """Dataset column that holds the right label."""
    labels: list[str] = Field(default_factory=list)
    """All labels of the task; without them a completion that names several cannot be caught."""
    partial: float = Field(default=0.3, ge=0.0, le=1.0)
    """Credit for a label that is there, but not first or not alone."""

    @model_validator(mode="after")
    def _check_labels(self) -> Exact:
        normal = [_normalise(label) for label in self.labels]
        for label, other in zip(self.labels, normal, strict=True):
            if not other or normal.count(other) > 1:
                raise InputError(f"label {label!r} is empty or equals another; rename it")
        return self

    @cached_property
    def _normal_labels(self) -> list[str]:
        return [_normalise(label) for label in self.labels]

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        """One value in [0, 1] per completion, None where the row has no label."""
        if self.column not in columns:
            raise InputError(
                f"the dataset has no column '{self.column}' with the labels; add it or set column"
            )
        labels = columns[self.column]
        texts = message_texts(completions)
        return [self._score(text, label) for text, label in zip(texts, labels, strict=True)]

    def _score(self, text: str, label: Any) -> float | None:
        if label is None:
            return None
        right = _normalise(str(label))
        if not right or (self.labels and right not in self._normal_labels):
            raise InputError(
                f"column '{self.column}' holds {label!r}, which is none of the labels "
                f"{', '.join(self.labels)}; correct the row or the labels"
            )
        return self._value(text, right)

    def _value(self, text: str, right: str) -> float:
        answer = _normalise(text)
        # Longest first: "computer science" must not count as a mention of "science".
        known = sorted({right, *self._normal_labels}, key=len, reverse=True)
        pattern = rf"(?<!\S)(?:{'|'.join(re.escape(label) for label in known)})(?!\S)"
        mentioned = [match.group() for match in re.finditer(pattern, answer)]
        if right not in mentioned:
            return 0.0
        leads = mentioned[0] == right and answer.startswith(right)
        if set(mentioned) != {right}:
            return self.partial if leads else 0.0
        if _normalise(text.strip().split("\n", 1)[0]) == right:
            return 1.0
        return 0.9 if leads else self.partial * min(1.0, 8 / len(answer.split()))


def _normalise(text: str) -> str:
    return " ".join(words(text))


_QUERY = "Positive or negative: 'I loved every minute.'"
_LABELS = {"labels": ["positive", "negative", "neutral"]}
_ROW = {"label": "positive"}
EXAMPLES = [
    Example(_QUERY, "Positive", True, 1.0, columns=_ROW, options=_LABELS),
    Example(_QUERY, "**Positive.**", True, 1.0, columns=_ROW, options=_LABELS),
    Example(_QUERY, "Positive, it is full of praise.", True, 0.9, columns=_ROW, options=_LABELS),
    Example(_QUERY, "It is a positive review.", False, 0.2, 0.3, columns=_ROW, options=_LABELS),
    Example(_QUERY, "positive negative neutral", False, high=0.3, columns=_ROW, options=_LABELS),
    Example(_QUERY, "negative or positive", False, high=0.0, columns=_ROW, options=_LABELS),
    Example(_QUERY, "Negative", False, high=0.0, columns=_ROW, options=_LABELS),
    Example(_QUERY, "positively", False, high=0.0, columns=_ROW, options=_LABELS),
    Example(_QUERY, "", False, high=0.0, columns=_ROW, options=_LABELS),
]
