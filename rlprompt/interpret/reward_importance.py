"""Which positions of a prompt its reward rests on: Shapley values of whole answers.

The worth of a set of positions is the reward of the answers that are drawn under these positions
alone, with the same draws for every set. Each set costs an answer to every query, so there is a
budget of sets: with a small one, a few runs of positions are looked at in all their sets, and the
values are exact but for the chance of queries and draws; with a large one, up to 16 runs in random
orders. Only of prompts that are vectors, whose positions can be left out of a whole answer.

Letters: m positions, S runs of positions, K pairs of orders, Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlprompt.interpret.clock import Slice
from rlprompt.interpret.derived import CutPrompt, vectors_of
from rlprompt.interpret.importance import MOST_SPANS, spans_of
from rlprompt.interpret.orders import MetOnce, exact_values, sampled_values
from rlprompt.interpret.subject import Subject

FEWEST_SETS = 4
"""With fewer there are no two runs of positions to compare."""


def runs_for(num_positions: int, most_sets: int) -> tuple[list[list[int]], bool]:
    """Runs of positions that a budget of sets allows, and whether all their sets are met.

    Args:
        num_positions: number of positions, m.
        most_sets: the budget, at least `FEWEST_SETS`.
    """
    spans = min(num_positions, MOST_SPANS)
    exact = min(spans, int(math.log2(most_sets)))
    if exact == spans or most_sets < 4 * spans:  # no room for two pairs of orders
        return spans_of(num_positions, exact), True
    return spans_of(num_positions, spans), False


def reward_importance(
    subject: Subject, most_sets: int, names: Sequence[str] | None, time: Slice
) -> dict[str, Any] | None:
    """Shapley values of a prompt's positions on the reward of test queries.

    Args:
        subject: what is inspected.
        most_sets: most sets of positions under which answers are drawn.
        names: a text for each position, such as its nearest token; None = there are none.
        time: time that there is.

    Returns:
        Plain values; None where there is no reward, a prompt that is not vectors, or no time for
        two runs of positions.
    """
    vectors = vectors_of(subject.policy, subject.prompt)
    if subject.rewards is None or vectors is None or len(vectors) < 2:
        return None
    before = time.seconds_left
    whole = subject.reward_means(subject.prompt)
    empty = subject.reward_means(CutPrompt(vectors[:0]))
    assert whole is not None and empty is not None
    spans, is_exact = runs_for(len(vectors), most_sets)
    per_set = before - time.seconds_left if math.isfinite(before) else 0.0
    while is_exact and len(spans) > 2 and not time.allows(per_set * (2 ** len(spans) - 2)):
        spans = spans_of(len(vectors), len(spans) - 1)

    def worth(kept: Sequence[int]) -> NDArray[np.float64]:
        if not kept or len(kept) == len(spans):
            return whole if kept else empty
        places = [place for span in kept for place in spans[span]]
        found = subject.reward_means(CutPrompt(vectors[places]))
        assert found is not None
        return found

    game = MetOnce(worth)
    if is_exact:
        if time.is_over:
            return None
        rows = exact_values(game, len(spans))[None]
    else:
        most_new = 2 * (len(spans) - 1)  # sets that an order and its reverse may add
        rows = sampled_values(
            game,
            len(spans),
            subject.seed,
            lambda _: not time.is_over and game.num_sets + most_new <= most_sets,
        )
        if len(rows) < 2:
            return None
    found: dict[str, Any] = {"sets": game.num_sets, "is_exact": is_exact}
    found |= {"orders": None if is_exact else 2 * len(rows)}
    said = _plain(rows, spans, names, whole, empty)
    return None if said is None else {**said, **found}


def _plain(
    rows: NDArray[np.float64],
    spans: Sequence[Sequence[int]],
    names: Sequence[str] | None,
    whole: NDArray[np.float64],
    empty: NDArray[np.float64],
) -> dict[str, Any] | None:
    """Marginal worths [K, S, Q] and rewards [Q] as plain values, of queries with all rewards."""
    known = np.isfinite(rows).all(axis=(0, 1))
    values = rows[:, :, known]
    if values.shape[2] < 2:
        return None
    errors = standard_errors(values)
    shown = [
        {
            "positions": f"{span[0]}" if len(span) == 1 else f"{span[0]}-{span[-1]}",
            "near": None if names is None else "".join(names[p] for p in span),
            "shapley": float(values[:, place].mean()),
            "error": float(errors[place]),
        }
        for place, span in enumerate(spans)
    ]
    return {
        "spans": shown,
        "whole": float(whole[known].mean()),
        "empty": float(empty[known].mean()),
        "num_queries": int(known.sum()),
    }


def standard_errors(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[S] standard errors of the mean of values [K, S, Q], from queries and from drawn orders.

    The two are added as independent, which is too large rather than too small: the mean over orders
    of each query has the chance of the orders in it already.

    Args:
        values: marginal worths, K = 1 where they are exact.
    """
    count = values.shape[2]
    by_query = values.mean(axis=0).std(axis=1, ddof=1) / math.sqrt(count)
    if len(values) < 2:
        found: NDArray[np.float64] = by_query
        return found
    by_order = values.mean(axis=2).std(axis=0, ddof=1) / math.sqrt(len(values))
    both: NDArray[np.float64] = np.hypot(by_query, by_order)
    return both
