"""The verdict on a learned prompt, in words: against its start, written texts, and the base.

It is the first line of console, report, summary, artifact card and comparison, so it must not be
kinder than the numbers: a prompt that is the one it began with has learned nothing, and one that
beats the base but not the hand-written text is not worth its file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from rlprompt.certify.comparison import Difference, Scores, paired_difference, query_means

REFERENCES: Mapping[str, str] = {
    "handwritten": "the hand-written text",
    "best_text": "the best of the given texts",
    "start": "the prompt it began with",
    "base": "the base without a system prompt",
}
"""What a learned prompt is held against, by its name in the records, in the order it is told."""

Split = Literal["test", "validation"]
Mood = Literal["good", "bad", "neutral"]


@dataclass(frozen=True)
class Verdict:
    """What may be said of a learned prompt."""

    learned: bool | None
    """Whether it is shown to be better than what it began with; None = nothing measured that."""
    sentence: str
    """The verdict in words."""
    mood: Mood
    """How to colour it: good only where it is better than everything it was held against."""
    differences: Mapping[str, Difference] = field(default_factory=dict)
    """Learned minus each reference, by the reference's name."""
    split: Split | None = None
    """The queries it rests on; None = no query was held out."""
    num_queries: int = 0
    """How many they are."""
    num_compared: int = 1
    """How many prompts it was chosen from on these very queries; 1 = chosen on others."""
    metric: str = "reward"
    """What was compared."""

    def plain(self) -> dict[str, Any]:
        """The verdict as JSON values; ends of intervals that are infinite are None."""
        found = asdict(self)
        for difference in found["differences"].values():
            interval = difference["interval"]
            for key in ("value", "low", "high"):
                interval[key] = interval[key] if math.isfinite(interval[key]) else None
        return found


def judge(
    scores: Mapping[str, Scores],
    *,
    split: Split,
    num_compared: int = 1,
    kept_start: bool = False,
    selection: str = "",
    without_signal: str | None = None,
    metric: str = "reward",
) -> Verdict:
    """Hold the learned prompt against everything that met the same queries.

    Args:
        scores: values [Q, n] of `learned` and of some of `REFERENCES`, by name.
        split: split that the queries are of.
        num_compared: number of prompts that the learned one was chosen from on these queries.
        kept_start: whether the learned prompt is the one it began with, because nothing was better.
        selection: sentences that say by which tests it was kept; empty = by its mean.
        without_signal: reason why no step could teach anything, as a part of a sentence; None =
            some could.
        metric: name of what the values are.
    """
    ours = scores.get("learned")
    if ours is None or bool(np.isnan(ours).all()):
        return unmeasured("no held-out completion could be scored", without_signal)
    differences = {
        name: paired_difference(ours, scores[name], num_compared=num_compared)
        for name in REFERENCES
        if name in scores
    }
    start = differences.get("start")
    learned = None if start is None else start.outcome == "better"
    if without_signal is not None or kept_start:
        learned = False
    known = int((~np.isnan(query_means(ours))).sum())
    basis = f"95% intervals, n = {known} {split} queries"
    if num_compared > 1:
        basis += f" that also chose it among {num_compared} prompts, which the intervals allow for"
    told = _told(differences, skip="start" if kept_start else "")
    compared = f"{_capital('; '.join(told))} ({basis})." if told else ""
    return Verdict(
        learned=learned,
        sentence=" ".join(
            part for part in (_nothing(kept_start, without_signal, selection), compared) if part
        ),
        mood=_mood(learned, differences),
        differences=differences,
        split=split,
        num_queries=known,
        num_compared=num_compared,
        metric=metric,
    )


def unmeasured(why: str, without_signal: str | None = None) -> Verdict:
    """The verdict where no held-out value exists.

    Args:
        why: reason, as a part of a sentence.
        without_signal: reason why no step could teach anything; None = some could.
    """
    if without_signal is not None:
        return Verdict(False, _nothing(False, without_signal), "bad")
    return Verdict(None, f"Nothing says whether anything was learned: {why}.", "neutral")


def _nothing(kept_start: bool, without_signal: str | None, selection: str = "") -> str:
    """The sentences that say what was kept, or that nothing was learned; or an empty text."""
    if without_signal is not None:
        return f"Nothing was learned, because {without_signal}."
    if selection:
        return selection
    if kept_start:
        return (
            "Nothing was learned: no later prompt did better on the validation queries than the "
            "one it began with, which was kept."
        )
    return ""


def _told(differences: Mapping[str, Difference], skip: str) -> Sequence[str]:
    """Phrases, bad news first, else in the order of `REFERENCES`."""
    order = ("worse", "unclear", "same", "better")
    shown = [name for name in differences if name != skip]
    shown.sort(key=lambda name: order.index(differences[name].outcome))
    return [phrase(differences[name], REFERENCES[name]) for name in shown]


def phrase(difference: Difference, other: str) -> str:
    """What may be said of one difference, such as "better than X by 0.21 (0.14 to 0.28)".

    Args:
        difference: learned minus the other.
        other: name of the other, with its article.
    """
    at = difference.interval
    if difference.outcome == "same":
        return f"the same as {other}"
    if difference.outcome == "unclear":
        return f"not shown to be better than {other}: {at.value:+.2f} ({_ends(at.low, at.high)})"
    low, high = sorted((abs(at.low), abs(at.high)))
    return f"{difference.outcome} than {other} by {abs(at.value):.2f} ({_ends(low, high)})"


def _ends(low: float, high: float) -> str:
    if math.isinf(low) or math.isinf(high):
        return "too few queries for an interval"
    return f"{low:.2f} to {high:.2f}"


def _mood(learned: bool | None, differences: Mapping[str, Difference]) -> Mood:
    outcomes = {difference.outcome for difference in differences.values()}
    if learned is False or "worse" in outcomes:
        return "bad"
    return "good" if outcomes == {"better"} else "neutral"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
