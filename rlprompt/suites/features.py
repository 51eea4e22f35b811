"""What changed most in the answers, without being told what to look for.

Two prompts answer the same questions. Features of an answer are counted: lengths, punctuation,
lists, refusals, first words, and every word or pair of words that many answers share. Each is
tested for a difference, all p-values are corrected together (Holm, 1979), and the largest effects
come first. Which words are looked at depends on the answers of both prompts together, not on who
gave them, so that the tests stay valid.

Letters: Q questions, n answers of each.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlprompt.certify.comparison import sign_flip_test
from rlprompt.rewards.rules.text import distinct_share, ends_complete, sentences, words
from rlprompt.suites.measures import declines

MOST_WORDS = 400
"""Words and pairs that are tested, the most frequent ones."""
_LEAST_SHARE = 0.08
_LIST = re.compile(r"^\s*(?:[-*\u2022]|\d+[.)])\s+", re.MULTILINE)

Texts = Sequence[Sequence[str]]
"""Q questions, n answers of each."""


def _share(pattern: str) -> Callable[[str], float]:
    """Matches of a pattern per word."""
    compiled = re.compile(pattern)
    return lambda text: len(compiled.findall(text)) / max(1, len(words(text)))


NUMBERS: Mapping[str, Callable[[str], float]] = {
    "words": lambda text: float(len(words(text))),
    "words per sentence": lambda text: len(words(text)) / max(1, len(sentences(text))),
    "letters per word": lambda text: float(np.mean([len(w) for w in words(text)] or [0])),
    "list entries": lambda text: float(len(_LIST.findall(text))),
    "commas per word": _share(r","),
    "question marks per word": _share(r"\?"),
    "exclamation marks per word": _share(r"!"),
    "digits per word": _share(r"\d"),
    "capitals per word": _share(r"[A-Z]"),
    "'I' per word": _share(r"\bI\b"),
    "'you' per word": _share(r"\b[Yy]ou\b"),
    "distinct pairs of words": lambda text: distinct_share(words(text), 2),
}
"""Features that are numbers."""
MARKS: Mapping[str, Callable[[str], bool]] = {
    "declines": declines,
    "ends complete": ends_complete,
    "has a list": lambda text: bool(_LIST.search(text)),
    "has a line break": lambda text: "\n" in text.strip(),
    "has code": lambda text: "```" in text,
    "is empty": lambda text: not text.strip(),
    "letters beyond ASCII": lambda text: any(c.isalpha() and not c.isascii() for c in text),
}
"""Features that an answer has or has not."""


@dataclass(frozen=True)
class Change:
    """How a feature differs between two prompts."""

    feature: str
    before: float
    """Mean over the answers of the first prompt; of a mark, the share that has it."""
    after: float
    effect: float
    """Difference of the questions' means in standard deviations of an answer's value."""
    p_value: float
    """Corrected for all features that were tested (Holm)."""
    question: int
    """Place of the question whose answers show it best."""


def compare_answers(before: Texts, after: Texts) -> list[Change]:
    """The features that changed, those beyond chance first, then by the size of the effect.

    Args:
        before: answers of one prompt, [Q, n].
        after: answers of the other to the same questions, [Q, m].

    Raises:
        ValueError: they are not answers to the same number of questions.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} questions cannot be compared with {len(after)}")
    found: list[Change] = []
    for name, number in NUMBERS.items():
        found += _change(name, before, after, number, sign_flip_test)
    for name, has in MARKS.items():
        found += _change(name, before, after, has, sign_test)
    for name, has in _frequent(before, after).items():
        found += _change(name, before, after, has, sign_test)
    corrected = holm([each.p_value for each in found])
    changes = [
        Change(e.feature, e.before, e.after, e.effect, p, e.question)
        for e, p in zip(found, corrected, strict=True)
    ]
    return sorted(changes, key=lambda e: (e.p_value > 0.05, -abs(e.effect), e.feature))


def sign_test(differences: NDArray[np.float64]) -> float:
    """Two-sided p-value that differences are as often above as below 0, exact.

    Args:
        differences: difference of each question, [Q]; zeros say nothing.
    """
    above, below = int((differences > 0).sum()), int((differences < 0).sum())
    return float(stats.binomtest(above, above + below).pvalue) if above + below else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected so that any false finding has the stated probability (Holm, 1979).

    Args:
        p_values: p-values of all tests.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = least
    return corrected


def _change(
    name: str,
    before: Texts,
    after: Texts,
    value: Callable[[str], float],
    test: Callable[[NDArray[np.float64]], float],
) -> list[Change]:
    """The change of a feature, as a list of one; none where no answer differs from another."""
    old = [np.array([float(value(text)) for text in own]) for own in before]
    new = [np.array([float(value(text)) for text in own]) for own in after]
    gaps = np.array([b.mean() - a.mean() for a, b in zip(old, new, strict=True)])
    spread = float(np.concatenate([*old, *new]).std())
    if not len(gaps) or spread == 0.0:
        return []
    best = int(np.argmax(gaps * (1.0 if gaps.mean() >= 0.0 else -1.0)))
    first, second = (float(np.mean([each.mean() for each in side])) for side in (old, new))
    return [Change(name, first, second, float(gaps.mean()) / spread, test(gaps), best)]


def _frequent(before: Texts, after: Texts) -> dict[str, Callable[[str], bool]]:
    """First words, words and pairs of words that enough answers of both prompts together have."""
    texts = [text for side in (before, after) for own in side for text in own]
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_tokens(text))
    least = max(3, round(_LEAST_SHARE * len(texts)))
    common = [name for name, count in counts.most_common(MOST_WORDS) if count >= least]
    return {name: _has(name) for name in common if counts[name] < len(texts)}


def _has(name: str) -> Callable[[str], bool]:
    return lambda text: name in _tokens(text)


def _tokens(text: str) -> frozenset[str]:
    found = words(text)
    pairs = {f"'{a} {b}'" for a, b in itertools.pairwise(found)}
    first = {f"begins with '{found[0]}'"} if found else set()
    return frozenset({f"'{word}'" for word in found} | pairs | first)
