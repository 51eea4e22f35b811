"""Queries of two splits that are nearly the same: a score on one then says little about the other.

Two texts are near-duplicates when they share more than four fifths of their words: Jaccard
similarity of the sets of normalised words, intersection over union, above 0.8. So one word added
to five counts, and so does one word exchanged in ten. Different questions of one form stay below:
"the difference between a frog and a toad" and "... a violin and a viola" share 0.64, the most that
any two queries of `recipes/data` do. A paraphrase in other words is not found.

The comparison is exact and not quadratic: a text that shares more than four fifths of its words
with another shares one of its rarest fifth (prefix filtering: Chaudhuri, Ganti and Kaushik, "A
primitive operator for similarity joins in data cleaning", ICDE 2006).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

MAX_COMPARISONS = 1_000_000
"""Pairs that are looked at, a few seconds; where that leaves some out, it is said."""

_SHARE = (4, 5)
"""What two near-duplicates exceed, as a fraction of integers: no rounding decides."""
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f]")
"""Kana, Han and Thai, which have no spaces between words: each character stands for a word."""


@dataclass(frozen=True)
class NearDuplicates:
    """Which texts of one split nearly repeat a text of another."""

    pairs: tuple[tuple[int, int], ...]
    """Position in the first split and in the second; each position of the first at most once."""
    is_complete: bool
    """False where the texts are so alike that not every pair was compared."""


def find_near_duplicates(
    texts: Sequence[str], others: Sequence[str], max_comparisons: int = MAX_COMPARISONS
) -> NearDuplicates:
    """Find the texts of one split that are nearly the same as a text of another.

    Args:
        texts: Normalised texts (`match_key`) of the smaller split.
        others: Normalised texts of the other split.
        max_comparisons: Bound on pairs that are looked at.

    Returns:
        One pair per text that has a near-duplicate, in the order of `texts`.
    """
    words = [_words(text) for text in texts]
    counts = Counter(word for each in words for word in each)
    rarity = {word: rank for rank, word in enumerate(sorted(counts, key=lambda w: (counts[w], w)))}
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for position, each in enumerate(words):
        for word in sorted(each, key=rarity.__getitem__)[: len(each) - _least(len(each)) + 1]:
            holders[word].append(position)
    found: dict[int, int] = {}
    left = max_comparisons
    for other, text in enumerate(others):
        each = _words(text)
        known = rarity.keys() & each
        spare = len(known) - _least(len(each))
        if spare < 0:
            continue
        for word in sorted(known, key=rarity.__getitem__)[: spare + 1]:
            for position in holders.get(word, ()):
                if left == 0:
                    return NearDuplicates(tuple(sorted(found.items())), is_complete=False)
                left -= 1
                if position not in found and _is_near(words[position], each):
                    found[position] = other
    return NearDuplicates(tuple(sorted(found.items())), is_complete=True)


def _words(text: str) -> set[str]:
    if _UNSPACED.search(text):
        text = _UNSPACED.sub(lambda match: f" {match.group()} ", text)
    return set(text.split())


def _least(count: int) -> int:
    """The fewest words of `count` that a near-duplicate has too."""
    return _SHARE[0] * count // _SHARE[1] + 1


def _is_near(one: set[str], other: set[str]) -> bool:
    few, many = sorted((len(one), len(other)))
    if _SHARE[1] * few <= _SHARE[0] * many:
        return False
    shared = len(one & other)
    return _SHARE[1] * shared > _SHARE[0] * (few + many - shared)
