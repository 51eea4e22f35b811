"""Which positions of a prompt its behaviour rests on: ablations, and Shapley values.

The worth of a set of positions is -KL(prompt || prompt with these positions only) per token, on the
prompt's own completions. A Shapley value (Shapley, 1953) is a position's mean marginal worth over
random orders; here it is estimated from orders that are drawn with their reverse (antithetic), and
comes with its standard error over such pairs. All values add up to KL(prompt || empty slot).

A prompt that is vectors is computed anew without those left out. Of keys and values, or under an
adapter, positions are masked: what later positions took from them before stays, so that a value is
of what answers attend to.

Letters: m positions, S spans of positions that are looked at as one, K pairs of orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlprompt.interpret.clock import Slice
from rlprompt.interpret.derived import CutPrompt, vectors_of, without_positions
from rlprompt.interpret.orders import MetOnce, Worth, sampled_values
from rlprompt.interpret.yardstick import Yardstick
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt

MOST_SPANS = 16
MOST_PAIRS = 8


@dataclass(frozen=True)
class Importances:
    """What each span is worth."""

    spans: Sequence[Sequence[int]]
    """S runs of positions of the slot."""
    alone: Sequence[float]
    """[S] KL in nats per token that leaving out this span only costs."""
    shapley: Sequence[float] | None
    """[S] in nats per token; None where there was no time for two pairs of orders."""
    errors: Sequence[float] | None
    """[S] standard errors of `shapley`."""
    num_orders: int
    """2 K."""
    whole: float
    """KL(prompt || empty slot): what Shapley values add up to."""
    is_recomputed: bool
    """Whether the prompt was computed anew without a span; else it was masked."""


def spans_of(num_positions: int, most: int = MOST_SPANS) -> list[list[int]]:
    """Positions as runs of equal length, but for one.

    Args:
        num_positions: number of positions, m.
        most: largest number of runs.
    """
    count = min(num_positions, most)
    return [part.tolist() for part in np.array_split(np.arange(num_positions), count)]


def shapley(worth: Worth, num_players: int, seed: int, time: Slice) -> list[list[float]]:
    """Marginal worths [K, S], each the mean over an order and its reverse.

    Args:
        worth: the worth of a set of players, given in ascending order; met once for each set.
        num_players: number of players, S.
        seed: seed of the orders.
        time: time that there is; a pair of orders that was begun is finished.
    """
    rows = sampled_values(
        MetOnce(worth),
        num_players,
        seed,
        lambda done: done < MOST_PAIRS and not time.is_over,
    )
    found: list[list[float]] = rows.tolist()
    return found


def importances(
    yardstick: Yardstick, prompt: Prompt, *, seed: int, time: Slice
) -> Importances | None:
    """Ablations and Shapley values of a prompt's positions.

    Args:
        yardstick: the prompt's own completions.
        prompt: the prompt.
        seed: seed of the orders.
        time: time that there is; ablations are made in any case.

    Returns:
        None of a prompt with no position in the slot.
    """
    policy = yardstick.policy
    head = len(policy.head_ids)
    positions = yardstick.prefix.num_tokens - head
    if positions < 1:
        return None
    spans = spans_of(positions)
    left = _restricted(yardstick, policy, prompt, head)

    def worth(kept: Sequence[int]) -> float:
        if len(kept) == len(spans):
            return 0.0
        return -left([place for span in kept for place in spans[span]])

    whole = -worth(())
    every = range(len(spans))
    alone = [-worth([other for other in every if other != span]) for span in every]
    rows = np.asarray(shapley(worth, len(spans), seed, time))
    has_error = len(rows) > 1
    return Importances(
        spans,
        alone,
        rows.mean(axis=0).tolist() if has_error else None,
        (rows.std(axis=0, ddof=1) / math.sqrt(len(rows))).tolist() if has_error else None,
        2 * len(rows),
        whole,
        vectors_of(policy, prompt) is not None,
    )


def _restricted(
    yardstick: Yardstick, policy: Policy, prompt: Prompt, head: int
) -> Callable[[Sequence[int]], float]:
    """A function from positions that stay to the KL in nats per token."""
    vectors = vectors_of(policy, prompt)

    def masked(kept: Sequence[int]) -> float:
        prefix = without_positions(yardstick.prefix, head, kept)
        return yardstick.pooled(yardstick.kl_of_prefix(prefix))

    def computed(kept: Sequence[int]) -> float:
        assert vectors is not None
        return yardstick.pooled(yardstick.kl(CutPrompt(vectors[list(kept)])))

    return masked if vectors is None else computed


def plain(found: Importances, names: Sequence[str] | None) -> dict[str, Any]:
    """Importances as plain values.

    Args:
        found: importances.
        names: a text for each position, such as its nearest token; None = there are none.
    """
    rows = []
    for place, span in enumerate(found.spans):
        label = f"{span[0]}" if len(span) == 1 else f"{span[0]}-{span[-1]}"
        near = None if names is None else "".join(names[position] for position in span)
        row: dict[str, Any] = {"positions": label, "near": near, "alone": found.alone[place]}
        if found.shapley is not None and found.errors is not None:
            row |= {"shapley": found.shapley[place], "error": found.errors[place]}
        rows.append(row)
    return {
        "spans": rows,
        "orders": found.num_orders,
        "whole": found.whole,
        "method": "recomputed" if found.is_recomputed else "masked",
    }
