"""What a straight line reads off the states before any answer begins.

Two questions, layer by layer. *Can the states under the prompt be told from those under another
text?* If no line tells them apart, the text puts the base into the same state; if one does from
some layer on, they differ there. And *is what the answer will be like there already?* A line that
is fitted to other queries predicts a feature of the answer, its reward or its length.

Lines are ridge regressions in the space of samples, so that dimensions may outnumber queries. Every
prediction is of queries that the line was not fitted to. The control is the same with what belongs
together exchanged at random: the best layer of each exchange, so that a p-value allows for having
looked at all layers (Westfall and Young's maximum).

Letters: L layers, Q queries, N = 2 Q samples, d model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlprompt.interpret.inside import States, states
from rlprompt.interpret.subject import Subject
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import TextPrompt

Array = NDArray[np.float64]

FOLDS = 4
EXCHANGES = 199
FEWEST = 8
"""Queries below which nothing is read."""
_RIDGE = 1.0
"""Penalty, in units of the mean squared length of a sample."""


class Readout(NamedTuple):
    """What lines read, by layer."""

    scores: Array
    """[L] accuracy, or correlation, on queries that a line was not fitted to."""
    control: float
    """The median, over exchanges, of the best layer's score."""
    p_value: float
    """Share of exchanges, this one counted, whose best layer is at least as good as ours."""


def told_apart(one: States, other: States, seed: int, exchanges: int = EXCHANGES) -> Readout:
    """How well a line tells states of the same queries under two prompts apart, by accuracy.

    Both states of a query are in the same fold. An exchange swaps them for some queries.

    Args:
        one: [Q, L, d] states under one prompt.
        other: [Q, L, d] states under the other.
        seed: seed of the folds and the exchanges.
        exchanges: number of exchanges.
    """
    random = np.random.default_rng(seed)
    count = len(one)
    folds = random.permutation(count) % FOLDS
    samples = np.concatenate([one, other])  # [N, L, d]
    labels = np.concatenate([np.ones(count), -np.ones(count)])
    signs = random.choice([-1.0, 1.0], (exchanges, count))
    targets = np.concatenate([labels[None], labels * np.concatenate([signs, signs], axis=1)])
    twice = np.concatenate([folds, folds])
    guesses = _predicted(samples, targets, twice)  # [1 + exchanges, L, N]
    # A guess of exactly 0 tells nothing: half right.
    hits = (np.sign(guesses) * targets[:, None] + 1.0) / 2.0
    return _readout(hits.mean(axis=2))


def foretold(found: States, feature: Array, seed: int, exchanges: int = EXCHANGES) -> Readout:
    """How well a line foretells a feature of answers, by correlation with what came.

    An exchange gives the features to other queries.

    Args:
        found: [Q, L, d] states before the answers.
        feature: [Q] what the answers were like.
        seed: seed of the folds and the exchanges.
        exchanges: number of exchanges.
    """
    random = np.random.default_rng(seed)
    count = len(found)
    folds = random.permutation(count) % FOLDS
    mixed = [random.permutation(feature) for _ in range(exchanges)]
    targets = np.asarray([feature, *mixed])
    guesses = _predicted(found, targets, folds)  # [1 + exchanges, L, Q]
    a = guesses - guesses.mean(axis=2, keepdims=True)
    b = (targets - targets.mean(axis=1, keepdims=True))[:, None]
    norms = np.linalg.norm(a, axis=2) * np.linalg.norm(b, axis=2)
    return _readout((a * b).sum(axis=2) / np.maximum(norms, 1e-12))


def _predicted(samples: Array, targets: Array, folds: NDArray[np.int64]) -> Array:
    """Predictions [T, L, N] of targets [T, N] from samples [N, L, d], each by the other folds."""
    out = np.zeros((len(targets), samples.shape[1], len(samples)))
    for layer in range(samples.shape[1]):
        for fold in range(FOLDS):
            fitted, asked = folds != fold, folds == fold
            if not asked.any():
                continue
            mean = samples[fitted, layer].mean(axis=0)
            own, new = samples[fitted, layer] - mean, samples[asked, layer] - mean
            gram = own @ own.T
            penalty = _RIDGE * max(float(np.trace(gram)) / len(gram), 1e-12)
            middle = targets[:, fitted].mean(axis=1, keepdims=True)
            weights = np.linalg.solve(
                gram + penalty * np.eye(len(gram)), (targets[:, fitted] - middle).T
            )
            out[:, layer, asked] = middle + (new @ own.T @ weights).T
    return out


def _readout(scores: Array) -> Readout:
    """Scores [1 + exchanges, L], the first row ours."""
    best = scores.max(axis=1)
    p_value = float((best[1:] >= best[0] - 1e-12).sum() + 1) / len(best)
    return Readout(scores[0], float(np.median(best[1:])), p_value)


def readouts(subject: Subject, sentence: str | None) -> dict[str, Any] | None:
    """What lines read under the inspected prompt, on test queries.

    Args:
        subject: what is inspected.
        sentence: best sentence, whose states the prompt's are told from; None = there is none.

    Returns:
        Plain values; None where the base's layers are not found, or queries are too few.
    """
    queries = subject.sides.test
    own = states(subject.policy, subject.prompt, queries) if len(queries) >= FEWEST else None
    if own is None:
        return None
    others: dict[str, Prompt] = {"no prompt": subject.base}
    if sentence is not None:
        others = {"best sentence": TextPrompt(sentence), **others}
    found: dict[str, Any] = {"num_queries": len(queries), "apart": {}, "foretold": {}}
    for name, prompt in others.items():
        theirs = states(subject.policy, prompt, queries)
        assert theirs is not None
        found["apart"][name] = _plain(told_apart(own, theirs, subject.seed))
    for name, feature in _features(subject).items():
        known = np.isfinite(feature)
        if known.sum() >= FEWEST and np.ptp(feature[known]) > 0:
            found["foretold"][name] = _plain(foretold(own[known], feature[known], subject.seed))
    return found


def _features(subject: Subject) -> dict[str, Array]:
    """What the prompt's answers to the test queries were like."""
    groups = subject.answers(subject.prompt)
    lengths = [np.log(np.mean([c.num_tokens for c in group.completions])) for group in groups]
    features = {"length of the answer (log tokens)": np.asarray(lengths)}
    rewards = subject.reward_means(subject.prompt)
    return features if rewards is None else {"reward of the answer": rewards, **features}


def _plain(found: Readout) -> dict[str, Any]:
    scores: Sequence[float] = found.scores.tolist()
    return {"by_layer": scores, "control": found.control, "p_value": found.p_value}
