"""Write for readers of a school grade. Copy this file, change it, name yours in a recipe.

    rewards:
      - {path: ../reward_models/style/reading_level.py:reward, options: {low: 2, high: 6}}

    value = max(0, 1 - distance / 6) * min(1, words / min_words)                     in [0, 1]

The distance is that of the Flesch-Kincaid grade (Kincaid et al., 1975) to the band [low, high]:
grade = 0.39 words/sentences + 11.8 syllables/words - 15.59. Syllables are groups of vowels, without
a silent final e: right for nine words in ten, and English only.

The grade is easily fooled by full stops ("A. b. c."); watch `builtin:relevance` beside it.
"""

from __future__ import annotations

import re
from typing import Any

from rlprompt.rewards import Example
from rlprompt.rewards.rules.text import message_texts, sentences, words

_VOWELS = re.compile(r"[aeiouy]+")


def reward(
    completions: list[Any], low: float = 1.0, high: float = 6.0, min_words: int = 8, **kwargs: Any
) -> list[float]:
    """One value in [0, 1] per completion."""
    return [score(text, low, high, min_words) for text in message_texts(completions)]


def score(text: str, low: float, high: float, min_words: int) -> float:
    """The formula above for one completion."""
    tokens = words(text)
    if not tokens:
        return 0.0
    grade = reading_grade(text)
    distance = max(low - grade, grade - high, 0.0)
    return max(0.0, 1.0 - distance / 6) * min(1.0, len(tokens) / min_words)


def reading_grade(text: str) -> float:
    """Flesch-Kincaid grade of an English text with at least one word."""
    tokens = words(text)
    count = sum(bool(words(piece)) for piece in sentences(text))
    syllables = sum(map(num_syllables, tokens))
    return 0.39 * len(tokens) / max(1, count) + 11.8 * syllables / len(tokens) - 15.59


def num_syllables(word: str) -> int:
    """Groups of vowels, at least one; a final e is silent unless it follows a consonant and l."""
    silent = word.endswith("e") and not re.search("[^aeiouy]le$", word)
    return max(1, len(_VOWELS.findall(word[:-1] if silent and len(word) > 2 else word)))


_QUERY = "What is photosynthesis?"
EXAMPLES = [
    Example(
        _QUERY,
        "Plants make their own food from light. They take in air and water, and give back the "
        "part of the air that we need.",
        True,
        0.9,
    ),
    Example(
        _QUERY,
        "Photosynthesis constitutes the biochemical conversion of electromagnetic radiation into "
        "carbohydrates, necessitating chlorophyll-mediated photolytic dissociation of water.",
        False,
        high=0.0,
    ),
    Example(_QUERY, "It is a. So be it. Go on.", False, high=0.6),
    Example(_QUERY, "Plants.", False, high=0.2),
    Example(_QUERY, "", False, high=0.0),
]
