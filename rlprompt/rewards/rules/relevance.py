"""Reward: the completion speaks about what the query asks and says something of its own."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field

from rlprompt.rewards.base import Example
from rlprompt.rewards.rules.stopwords import STOP_WORDS
from rlprompt.rewards.rules.text import content_stems, message_texts, sentences, topic_stems, words
from rlprompt.settings import Settings


class Relevance(Settings):
    """Content-word overlap with the query, in [0, 1]; see `relevance`.

    A rule on English words: it misses synonyms, so right answers that share no word with their
    query get 0. Use it with a small weight beside other rewards, or as a metric. None where the
    query has no content word ("How are you?").
    """

    share: float = Field(default=0.5, gt=0.0, le=1.0)
    """Share of the query's content words (at most 8 are counted) that gives full coverage."""
    new_words: int = Field(default=2, ge=1)
    """Distinct content words that the query does not have, for full novelty."""

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[Any]:
        """One value in [0, 1] or None per completion."""
        pairs = zip(message_texts(prompts), message_texts(completions), strict=True)
        return [relevance(*pair, self.share, self.new_words) for pair in pairs]


def relevance(query: str, completion: str, share: float = 0.5, new_words: int = 2) -> float | None:
    """Coverage * novelty * prose of one completion, in [0, 1]; None when the query has no topic.

    Only sentences that hold a content word of their own count, so echoing the query or turning it
    into "A volcano is a volcano." earns nothing. Coverage is the number of the query's content
    words in them over ceil(share * min(8, all)), at most 1. Novelty is the number of content words
    that the query does not have over `new_words`, at most 1. Prose falls from 1 to 0.5 when fewer
    than 20 % of at least four words are function words, as in a list of keywords.
    """
    topic = topic_stems(query)
    if not topic:
        return None
    asked = set(content_stems(query))
    told: set[str] = set()
    for sentence in sentences(completion):
        stems = set(content_stems(sentence))
        if stems - asked:
            told |= stems
    coverage = min(1.0, len(topic & told) / math.ceil(share * min(8, len(topic))))
    novelty = min(1.0, len(told - asked) / new_words)
    return coverage * novelty * _prose(words(completion))


def _prose(tokens: list[str]) -> float:
    if len(tokens) < 4:
        return 1.0
    share = sum(token in STOP_WORDS["en"] for token in tokens) / len(tokens)
    return 0.5 + 0.5 * min(1.0, share / 0.2)


_QUERY = "What is a volcano?"
_HOW = "How do I keep basil plants alive in winter?"
EXAMPLES = [
    Example(_QUERY, "A volcano is an opening where molten rock leaves the Earth.", True, 0.9),
    Example(_QUERY, "Volcanoes are mountains that can erupt.", True, 0.9),
    Example(_QUERY, "A volcano is a volcano.", False, high=0.0),
    Example(_QUERY, "What is a volcano?", False, high=0.0),
    Example(_QUERY, "What is a volcano? Bananas are yellow.", False, high=0.0),
    Example(_QUERY, "volcano lava magma ash rock crater", False, high=0.5),
    Example(_QUERY, "Bananas are a yellow fruit.", False, high=0.0),
    Example(_QUERY, "", False, high=0.0),
    Example(_HOW, "Keep the basil on a sunny sill and water the plants less.", True, 0.9),
    Example(_HOW, "Keep basil plants alive in winter.", False, high=0.0),
    Example(_HOW, "That is a great question about your hobby.", False, high=0.0),
]
