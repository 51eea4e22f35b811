"""How the learned prompt stands against its start, written texts and the base.

A run keeps what every held-out completion of these got, by query, because only paired values tell
whether a difference is real; `rlprompt.certify` says what follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlprompt.certify.comparison import Scores
from rlprompt.certify.verdict import Verdict, judge, unmeasured
from rlprompt.evaluation.heldout import HeldoutResult
from rlprompt.runs.selection import selection_sentence
from rlprompt.runs.signal import without_signal
from rlprompt.runs.state import PlainScores, Progress


@dataclass(frozen=True)
class Tested:
    """What the test queries said."""

    steps: list[int]
    """Steps whose prompts of this run have met them, this one included."""
    metrics: dict[str, dict[str, object]] = field(default_factory=dict)
    """By who was evaluated."""
    scores: dict[str, PlainScores] = field(default_factory=dict)
    """What each completion got of what the prompt was chosen by."""


def plain_scores(result: HeldoutResult, metric: str) -> PlainScores:
    """Values [Q][n] of an evaluation as JSON has them: None where a completion has none.

    Args:
        result: what an evaluation found.
        metric: `reward`, or the name of a reward.
    """
    found = result.scores.get(metric)
    if found is None:
        return []
    return [[None if math.isnan(value) else float(value) for value in row] for row in found]


def validation_verdict(progress: Progress, metric: str) -> Verdict:
    """The verdict on the validation queries, which also chose the prompt.

    Args:
        progress: counters and values of the run.
        metric: what the prompt was chosen by.
    """
    why = without_signal(progress.signal)
    if not progress.scores:
        return unmeasured("no query was held out (data.heldout: 0)", why)
    return judge(
        _tables(progress.scores),
        split="validation",
        num_compared=max(1, progress.num_evaluations + progress.num_rivals),
        kept_start=progress.kept_start,
        selection=selection_sentence(progress),
        without_signal=why,
        metric=metric,
    )


def test_verdict(
    progress: Progress, scores: Mapping[str, PlainScores], num_tested: int, metric: str
) -> Verdict:
    """The verdict on the test queries, which chose nothing.

    Args:
        progress: counters and values of the run.
        scores: values on the test queries by who was evaluated.
        num_tested: number of prompts of this run that have met the test queries so far.
        metric: what the prompt was chosen by.
    """
    return judge(
        _tables(scores),
        split="test",
        num_compared=num_tested,
        kept_start=progress.kept_start,
        selection=selection_sentence(progress),
        without_signal=without_signal(progress.signal),
        metric=metric,
    )


def _tables(scores: Mapping[str, PlainScores]) -> dict[str, Scores]:
    return {who: _table(rows) for who, rows in scores.items() if rows}


def _table(rows: Sequence[Sequence[float | None]]) -> Scores:
    return np.array([[math.nan if value is None else value for value in row] for row in rows])
