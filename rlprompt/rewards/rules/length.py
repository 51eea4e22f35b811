"""Reward: the completion's length lies in a band."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from rlprompt.errors import InputError
from rlprompt.rewards.base import Example
from rlprompt.rewards.rules.text import message_texts, words
from rlprompt.settings import Settings


class Length(Settings):
    """1.0 inside [min, max], falling with the logarithm of how far outside; in [0, 1].

    With n the length and x = n / max above the band, min / n below it:
    value = max(0, 1 - log2(x) / octaves). A logarithm, because an answer ten times too long must
    still gain from becoming five times too long. An empty completion gets 0.

    Alone this is soon hacked by short empty talk: combine it with `sentence` and `relevance`.
    """

    max: int = Field(gt=0)
    """Largest length that gets the full value."""
    min: int = Field(default=1, ge=1)
    """Smallest length that gets the full value."""
    unit: Literal["words", "characters", "tokens"] = "words"
    """What is counted; tokens are the model's, the stop token included."""
    octaves: float = Field(default=3.0, gt=0)
    """Doublings above max, or halvings below min, at which the value reaches 0."""

    @model_validator(mode="after")
    def _check_band(self) -> Length:
        if self.min > self.max:
            raise InputError(f"min {self.min} is above max {self.max}; swap them")
        return self

    def __call__(
        self, completions: list[Any], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        """One value in [0, 1] per completion."""
        texts = message_texts(completions)
        if self.unit == "tokens":
            pairs = zip(texts, completion_ids, strict=True)
            lengths = [len(ids) if text.strip() else 0 for text, ids in pairs]
        elif self.unit == "words":
            lengths = [len(words(text)) for text in texts]
        else:
            lengths = [len(text.strip()) for text in texts]
        return [self._value(length) for length in lengths]

    def _value(self, length: int) -> float:
        if length == 0:
            return 0.0
        excess = max(length / self.max, self.min / length, 1.0)
        return max(0.0, 1.0 - math.log2(excess) / self.octaves)


_BAND = {"min": 4, "max": 8}
EXAMPLES = [
    Example("What is rain?", "Rain is water that falls from clouds.", True, 1.0, options=_BAND),
    Example("What is rain?", "Rain is water " * 8, False, 0.4, 0.6, options=_BAND),
    Example("What is rain?", "Water.", False, 0.3, 0.4, options=_BAND),
    Example("What is rain?", "", False, 0.0, 0.0, options=_BAND),
    Example("What is rain?", "rain " * 500, False, 0.0, 0.0, options=_BAND),
]
