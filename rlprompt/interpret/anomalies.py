"""What about a prompt is unusual: flags that say where to look, and no verdicts.

A flag compares the prompt with the base's own vocabulary, or one part of its behaviour with the
rest. Each carries the number that raised it and the limit that it is held against.

Letters: Q queries, m positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlprompt.interpret.yardstick import Means
from rlprompt.types import Query

LONG_VECTOR = 3.0
"""Norm of a vector over the median norm of an embedding."""
FAR_QUERY = 5.0
"""Robust z of one query's KL to the base among those of the others."""
ONE_POSITION = 0.6
"""Share of the attention to the prompt, or of its worth, that one of several positions has."""


def flag(name: str, value: float, limit: float, sentence: str) -> dict[str, Any]:
    """A flag as plain values.

    Args:
        name: name of what was looked at.
        value: value of it.
        limit: limit that it is held against.
        sentence: what it means, in plain words.
    """
    is_raised = bool(value > limit)
    return {
        "name": name,
        "value": float(value),
        "limit": limit,
        "raised": is_raised,
        "sentence": sentence if is_raised else "",
    }


def of_vectors(norms: Sequence[float]) -> dict[str, Any]:
    """Whether a vector is much longer than any token's embedding.

    Args:
        norms: [m] norms relative to the median embedding.
    """
    longest = int(np.argmax(norms))
    return flag(
        "longest vector",
        norms[longest],
        LONG_VECTOR,
        f"Vector {longest} is {norms[longest]:.1f} times as long as a usual embedding: no token "
        "can do what it does.",
    )


def of_queries(by_query: Means, queries: Sequence[Query]) -> dict[str, Any]:
    """Whether the prompt changes the answer to one query far more than to the others.

    Args:
        by_query: [Q] KL between prompt and base.
        queries: the queries.
    """
    scores = robust_z(by_query)
    most = int(np.argmax(scores))
    return flag(
        "query that is changed most",
        scores[most],
        FAR_QUERY,
        f"The prompt changes the answer to '{queries[most].text[:80]}' far more than the others "
        f"({by_query[most]:.2f} nats per token, the median is {np.median(by_query):.2f}).",
    )


def of_positions(name: str, shares: Sequence[float]) -> dict[str, Any] | None:
    """Whether one position carries the prompt; None where there are fewer than four.

    Args:
        name: name of what is shared out.
        shares: what each position has, any unit; below 0 counts as 0.
    """
    values = np.maximum(np.asarray(shares, dtype=np.float64), 0.0)
    if len(values) < 4 or values.sum() <= 0:
        return None
    most = int(np.argmax(values))
    share = float(values[most] / values.sum())
    return flag(name, share, ONE_POSITION, f"Position {most} alone has {share:.0%} of the {name}.")


def robust_z(values: Means) -> NDArray[np.float64]:
    """Distances from the median in robust standard deviations (1.4826 times the median distance).

    Args:
        values: the values.
    """
    middle = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - middle))
    scores: NDArray[np.float64] = (values - middle) / max(spread, 1e-3)
    return scores
