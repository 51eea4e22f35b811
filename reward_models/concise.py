"""Short answers that still answer. Copy this file, change it, name yours in a recipe.

    rewards:
      - path: ../reward_models/concise.py:reward
        options: {target_words: 25}

A bare length reward is hacked within a few updates ("A volcano is a volcano."), so the value is a
product: being short pays only as much as the answer is complete, on the topic, and says something.

    value = brevity * substance * topic * complete * distinct        in [0, 1]

    brevity    1 up to `target_words`, then falling with log2 of the excess, 0 at eight times it
    substance  n / (n + 1), n = content words that neither the query nor empty talk holds
    topic      0.25 + 0.75 * word overlap with the query (a noisy sign, so it never rules alone)
    complete   1.0 when the last sentence ends, 0.3 when it is cut off
    distinct   share of three-word sequences that are not repetitions

What it cannot see: whether the answer is true. Add a KL term, and watch `builtin:relevance` and
`builtin:repetition` as metrics.
"""

from __future__ import annotations

import math
from typing import Any

from rlprompt.rewards import Example
from rlprompt.rewards.rules.relevance import relevance
from rlprompt.rewards.rules.text import (
    distinct_share,
    ends_complete,
    message_texts,
    own_stems,
    words,
)


def reward(
    prompts: list[Any], completions: list[Any], target_words: int = 25, **kwargs: Any
) -> list[float]:
    """One value in [0, 1] per completion."""
    pairs = zip(message_texts(prompts), message_texts(completions), strict=True)
    return [score(query, completion, target_words) for query, completion in pairs]


def score(query: str, completion: str, target_words: int) -> float:
    """The product above for one completion."""
    tokens = words(completion)
    if not tokens:
        return 0.0
    brevity = max(0.0, 1.0 - math.log2(max(1.0, len(tokens) / target_words)) / 3)
    new = own_stems(query, completion)
    overlap = relevance(query, completion)
    topic = 1.0 if overlap is None else 0.25 + 0.75 * overlap
    complete = 1.0 if ends_complete(completion) else 0.3
    return brevity * len(new) / (len(new) + 1) * topic * complete * distinct_share(tokens, 3)


_QUERY = "What is a volcano?"
_LONG = (
    "Well, that depends on how you look at it. A volcano is an opening in the crust of the Earth, "
    "and through it molten rock, ash and gas can leave the hot layers below. Over many years the "
    "cooled rock piles up around the opening, so most volcanoes look like mountains, although some "
    "are flat and some lie under the sea, where they build islands that later rise above the water."
)
EXAMPLES = [
    Example(_QUERY, "A volcano is a vent where molten rock leaves the Earth.", True, 0.7),
    Example(_QUERY, "It is a mountain; a volcano erupts lava and ash.", True, 0.7),
    Example(_QUERY, _LONG, False, 0.3, 0.65),
    Example(
        _QUERY, "A volcano is an opening in the crust of the Earth, and through", False, high=0.4
    ),
    Example(_QUERY, "A volcano is a volcano.", False, high=0.0),
    Example(_QUERY, "What is a volcano?", False, high=0.0),
    Example(_QUERY, "A volcano is an important and interesting topic.", False, high=0.3),
    Example(_QUERY, "This happens every day in many places.", False, high=0.25),
    Example(_QUERY, "I am a helpful assistant.", False, high=0.3),
    Example(_QUERY, "Volcano lava magma", False, high=0.3),
    Example(_QUERY, "A volcano erupts lava. " * 10, False, high=0.25),
    Example(_QUERY, "Yes.", False, high=0.3),
    Example(_QUERY, "", False, high=0.0),
]
