"""Which of several claims may be made together: learn-then-test.

A candidate is a prompt, or a prompt with a threshold; its null hypothesis is that the claim is
false ("the rate is at least alpha"). Angelopoulos et al. 2021 (arXiv 2110.01052): whatever makes
the candidates, claims that pass a test of the family-wise error rate are all true with probability
1 - delta. The number of candidates is the number that was looked at on these queries, also of those
that are not claimed: best of 50 on 100 queries lies with probability 0.70 where a plain 95% bound
is used. Nothing is assumed of how the candidates depend on each other, and all may be scored on the
same queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Method = Literal["holm", "bonferroni", "fixed_sequence"]
METHODS: tuple[Method, ...] = ("holm", "bonferroni", "fixed_sequence")


def joint_p_values(p_values: Sequence[Sequence[float]] | Array) -> Array:
    """One p-value per candidate for "at least one of its risks is too high".

    The largest of its risks' p-values (intersection-union, Berger 1982): all risks of a candidate
    are claimed together at no price. The worst of several groups is claimed in the same way.

    Args:
        p_values: [candidates, risks] p-values.

    Returns:
        [candidates] p-values.
    """
    table = np.asarray(p_values, dtype=np.float64)
    return np.asarray(table.max(axis=1))


def passing(
    p_values: Sequence[float] | Array,
    delta: float,
    *,
    method: Method = "holm",
    num_compared: int | None = None,
) -> NDArray[np.bool_]:
    """Which candidates may be claimed, all at once, at the family-wise error rate delta.

    Args:
        p_values: [candidates] p-values of the nulls. For `fixed_sequence` they stand in the order
            of testing, which must not depend on the queries that gave them: an order by scores on
            the validation split is one.
        delta: probability with which any claim may be false.
        method: `holm` (1979), `bonferroni`, or `fixed_sequence` (each at the full delta until the
            first that fails; strong where the order is good, and blind behind a bad first).
        num_compared: number of candidates that were looked at on these queries, those included
            that have no p-value here; None = as many as there are p-values.

    Returns:
        Bool [candidates].

    Raises:
        ValueError: there are more p-values than candidates, or untested candidates in a sequence.
    """
    values = np.asarray(p_values, dtype=np.float64)
    count = len(values) if num_compared is None else num_compared
    if count < len(values):
        raise ValueError(f"{len(values)} p-values are given for {count} candidates; count again")
    if method == "bonferroni":
        return values <= delta / count
    if method == "holm":
        # Candidates without a p-value never pass, so they stand at the end.
        order = np.argsort(values, kind="stable")
        bars = delta / (count - np.arange(len(values)))
        below = np.logical_and.accumulate(values[order] <= bars)
        result = np.zeros(len(values), dtype=bool)
        result[order] = below
        return result
    if count > len(values):
        raise ValueError(
            f"a sequence tests every candidate, and {count - len(values)} of {count} have no "
            "p-value; use holm"
        )
    return np.logical_and.accumulate(values <= delta)
