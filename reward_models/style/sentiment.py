"""Answer in a tone. Copy this file, change it, name yours in a recipe.

    rewards:
      - {path: ../reward_models/style/sentiment.py:reward, options: {tone: positive}}

    value = tone * min(1, max_density / density) * min(1, words / 5)                 in [0, 1]

    tone     from VADER's compound score c (Hutto and Gilbert, 2014): (1 + c) / 2 for positive,
             (1 - c) / 2 for negative, 1 - |c| for neutral
    density  share of the words that stand in VADER's lexicon of feelings: a list of them is no tone

Needs the package vaderSentiment (`pip install 'rlprompt[rules]'`); English.
"""

from __future__ import annotations

import functools
from typing import Any

from rlprompt.errors import InputError
from rlprompt.rewards import Example
from rlprompt.rewards.rules.text import message_texts, words

REQUIRES = "vaderSentiment"
MAX_CHARACTERS = 4000
MAX_DENSITY = 0.35


def reward(completions: list[Any], tone: str = "positive", **kwargs: Any) -> list[float]:
    """One value in [0, 1] per completion."""
    if tone not in ("positive", "neutral", "negative"):
        raise InputError(f"tone is {tone!r}; choose positive, neutral or negative")
    return [score(text[:MAX_CHARACTERS], tone) for text in message_texts(completions)]


def score(text: str, tone: str) -> float:
    """The formula above for one completion."""
    tokens = words(text)
    if not tokens:
        return 0.0
    analyzer = _analyzer()
    compound = float(analyzer.polarity_scores(text)["compound"])
    value = {
        "positive": (1 + compound) / 2,
        "negative": (1 - compound) / 2,
        "neutral": 1 - abs(compound),
    }[tone]
    density = sum(token in analyzer.lexicon for token in tokens) / len(tokens)
    return value * min(1.0, MAX_DENSITY / max(density, 1e-9)) * min(1.0, len(tokens) / 5)


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise InputError(
            "sentiment needs the package vaderSentiment; run `pip install 'rlprompt[rules]'`"
        ) from error
    return SentimentIntensityAnalyzer()


_QUERY = "How was the concert?"
_SAD = {"tone": "negative"}
EXAMPLES = [
    Example(_QUERY, "The band was wonderful and the whole hall sang along with joy.", True, 0.8),
    Example(_QUERY, "The band was dreadful and the hall was cold and ugly.", False, high=0.3),
    Example(_QUERY, "The band played for two hours in the hall.", False, high=0.7),
    Example(_QUERY, "great great great love love happy happy wonderful", False, high=0.4),
    Example(_QUERY, "Great!", False, high=0.4),
    Example(_QUERY, "", False, high=0.0),
    Example(
        _QUERY, "The band was dreadful and the hall was cold and ugly.", True, 0.8, options=_SAD
    ),
    Example(_QUERY, "The band was wonderful.", False, high=0.3, options=_SAD),
]
