"""Rewards that compare the completions of one query with each other.

    from rlprompt.rewards.rules.group import PerGroup, win_rates

    def compare(query, left, right):           # 1.0 left is better, 0.5 a tie, 0.0 right is better
        return 1.0 if len(left) < len(right) else 0.0

    def rank(query, texts):
        return win_rates(query, texts, compare)

    reward = PerGroup(rank)                    # a recipe names it like any other reward

Letters: G completions of one query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlprompt.rewards.rules.text import message_texts

Compare = Callable[[str, str, str], float]
"""`(query, left, right)` -> how sure it is that `left` is better, in [0, 1]."""
ScoreGroup = Callable[[str, Sequence[str]], Sequence[float | None]]
"""`(query, completions)` -> one value or None per completion."""


class PerGroup:
    """Calls a function once per query with all its completions."""

    def __init__(self, function: ScoreGroup) -> None:
        """Keep the function; one defined at the top of a module can be pickled."""
        self.function = function

    def __call__(
        self, prompts: list[Any], completions: list[Any], group_index: list[int], **kwargs: Any
    ) -> list[float | None]:
        """One value per completion, in the order of the batch."""
        queries, texts = message_texts(prompts), message_texts(completions)
        groups: dict[int, list[int]] = {}
        for position, group in enumerate(group_index):
            groups.setdefault(group, []).append(position)
        values: list[float | None] = [None] * len(texts)
        for positions in groups.values():
            found = self.function(queries[positions[0]], [texts[i] for i in positions])
            for position, value in zip(positions, found, strict=True):
                values[position] = value
        return values


def win_rates(query: str, texts: Sequence[str], compare: Compare) -> list[float | None]:
    """Share of its G - 1 siblings that each completion beats, in [0, 1]; None for a lone one.

    Each pair is asked once in each order and averaged, which cancels a preference for the left or
    right place; so G * (G - 1) comparisons are made.
    """
    if len(texts) < 2:
        return [None] * len(texts)
    wins = [0.0] * len(texts)
    for i, left in enumerate(texts):
        for j, right in enumerate(texts[:i]):
            better = (compare(query, left, right) + 1.0 - compare(query, right, left)) / 2
            wins[i] += better
            wins[j] += 1.0 - better
    return [each / (len(texts) - 1) for each in wins]
