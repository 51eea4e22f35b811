r"""The right number. Copy this file, change it, name yours in a recipe.

    rewards:
      - {path: ../reward_models/task/numeric.py:reward, options: {tolerance: 0.01}}

The dataset's column `answer` holds the number of each row (None: the row is not scored).

    value = 1.0 when the answer given is within `tolerance` * max(1, |right|) of the right one,
            0.1 when there is a number at all, else 0                                in [0, 1]

The answer given is the number in `\boxed{...}`, else the one after the last "answer is", "answer:"
or "=", else the last number of the text. Only one number is read, so listing many earns nothing.
"""

from __future__ import annotations

import math
import re
from typing import Any

from rlprompt.errors import InputError
from rlprompt.rewards import Example
from rlprompt.rewards.rules.text import message_texts

_NUMBER = r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?:/\d+)?%?"
_BOXED = re.compile(rf"\\boxed\{{\s*\$?({_NUMBER})")
_STATED = re.compile(rf"(?:answer(?: is|:)|=)\s*\$?\**\s*({_NUMBER})", re.IGNORECASE)
_ANY = re.compile(rf"(?<![\w.])({_NUMBER})")
MAX_CHARACTERS = 8000
"""Read from the end of the completion."""


def reward(
    completions: list[Any], answer: list[Any], tolerance: float = 1e-6, **kwargs: Any
) -> list[float | None]:
    """One value in [0, 1] per completion, None where the row has no answer."""
    rows = zip(message_texts(completions), answer, strict=True)
    return [None if each is None else score(text, _right(each), tolerance) for text, each in rows]


def score(text: str, right: float, tolerance: float) -> float:
    """The value of one completion."""
    given = given_number(text)
    if given is None:
        return 0.0
    return 1.0 if abs(given - right) <= tolerance * max(1.0, abs(right)) else 0.1


def given_number(text: str) -> float | None:
    """The number that a text gives as its answer; None when it gives none."""
    tail = text[-MAX_CHARACTERS:]
    for pattern in (_BOXED, _STATED, _ANY):
        found = pattern.findall(tail)
        if found:
            return _parse(found[-1])
    return None


def _parse(piece: str) -> float | None:
    plain = piece.replace(",", "").replace("\u2212", "-")
    scale = 0.01 if plain.endswith("%") else 1.0
    top, _, bottom = plain.rstrip("%").partition("/")
    if bottom and int(bottom[:300]) == 0:
        return None
    value = float(top[:300]) / (float(bottom[:300]) if bottom else 1.0) * scale
    return value if math.isfinite(value) else None


def _right(value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(_NUMBER, value.strip()):
        value = _parse(value.strip())
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"column 'answer' holds {value!r}; write a number in each row")
    return float(value)


_QUERY = "A box holds 12 eggs. How many eggs are in 4 boxes?"
_ROW = {"answer": 48}
EXAMPLES = [
    Example(_QUERY, "12 * 4 = 48", True, 1.0, columns=_ROW),
    Example(
        _QUERY, "There are 4 boxes with 12 eggs, so the answer is 48.", True, 1.0, columns=_ROW
    ),
    Example(_QUERY, r"\boxed{48}", True, 1.0, columns=_ROW),
    Example(_QUERY, "The answer is 16.", False, 0.1, 0.1, columns=_ROW),
    Example(_QUERY, "It is 48, or maybe 50.", False, 0.1, 0.1, columns=_ROW),
    Example(_QUERY, "Many.", False, high=0.0, columns=_ROW),
    Example(_QUERY, "", False, high=0.0, columns=_ROW),
]
