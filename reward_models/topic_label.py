"""Name the topic of a text with one label. Copy this file, change it, name yours in a recipe.

    rewards:
      - path: ../reward_models/topic_label.py:reward
        options: {labels: [sports, food, technology, travel, money]}

The dataset's column `label` holds the right label of each row (None: the row is not scored).

    value = 0.9 * exact + 0.1 * form                                 in [0, 1]

    exact  1.0 when the first line is the right label, 0.9 when the answer begins with it, at most
           0.3 when it comes later or beside another label, else 0 (see
           rlprompt.rewards.rules.exact)
    form   min(1, 2 / words), halved unless the answer is the bare label, and 0 for a wrong label:
           a slope towards short answers for a model that does not yet know what is wanted

`correct` is the accuracy, for the role `metric`.

A wrong label must not be worth more than no label. Where it is, a model that has yet to learn the
format learns it as one constant label, and from then on its groups hold nothing to choose from
(docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlprompt.rewards import Example
from rlprompt.rewards.rules.exact import Exact
from rlprompt.rewards.rules.text import message_texts, words

LABELS = ("sports", "food", "technology", "travel", "money")


def reward(
    completions: list[Any],
    label: list[str | None],
    labels: Sequence[str] = LABELS,
    **kwargs: Any,
) -> list[float | None]:
    """One value in [0, 1] per completion, None where the row has no label."""
    exact = Exact(column="label", labels=list(labels))(completions, label=label)
    known = [" ".join(words(each)) for each in labels]
    answers = [" ".join(words(text)) for text in message_texts(completions)]
    return [
        None if value is None else 0.9 * value + 0.1 * form(answer, value, known)
        for value, answer in zip(exact, answers, strict=True)
    ]


def correct(
    completions: list[Any],
    label: list[str | None],
    labels: Sequence[str] = LABELS,
    **kwargs: Any,
) -> list[float | None]:
    """1.0 for the bare right label, else 0.0: the accuracy, for the role `metric`."""
    exact = Exact(column="label", labels=list(labels))(completions, label=label)
    return [None if value is None else float(value == 1.0) for value in exact]


def form(answer: str, exact: float, labels: Sequence[str]) -> float:
    """How much an answer looks like a label, in [0, 1]; 0 for a wrong label."""
    length = len(answer.split())
    if not length or (exact == 0.0 and answer in labels):
        return 0.0
    return min(1.0, 2 / length) * (1.0 if answer in labels else 0.5)


_QUERY = "The striker scored twice in the second half."
_ROW = {"label": "sports"}
EXAMPLES = [
    Example(_QUERY, "Sports", True, 1.0, columns=_ROW),
    Example(_QUERY, "sports.", True, 1.0, columns=_ROW),
    Example(_QUERY, "Sports: it tells of a match.", True, 0.8, columns=_ROW),
    Example(_QUERY, "The topic is sports.", False, 0.2, 0.3, columns=_ROW),
    Example(_QUERY, "Technology", False, high=0.0, columns=_ROW),
    Example(_QUERY, "sports food technology travel money", False, high=0.3, columns=_ROW),
    Example(_QUERY, "money or sports", False, high=0.1, columns=_ROW),
    Example(_QUERY, "sportswear", False, high=0.05, columns=_ROW),
    Example(_QUERY, "The striker scored twice in the second half.", False, high=0.05, columns=_ROW),
    Example(_QUERY, "", False, high=0.0, columns=_ROW),
]
