"""Watching a stream of losses and stopping at any time: e-processes and confidence sequences.

An e-process is the wealth of bets against a claim. As long as the claim is true it reaches 1/delta
with probability at most delta, *ever* (Ville 1939): it may be looked at after each answer, and the
alarm need not know when it will be looked at again. A plain interval that is looked at after each
of 1,000 answers misses several times as often as it says.

The bets are the fixed mixture of `certify.bounds`. Assumes losses in [0, 1] of which each has at
most (at least) the claimed mean given those before it: independence is not needed. Broken by
leaving answers out for a reason that has to do with their loss.

Letters: T times, S starts, J bets, M means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from rlprompt.certify.bounds import BETS, Array, checked_losses

Side = Literal["above", "below"]

_MEANS = 1000
"""Means that a confidence sequence tells apart in [0, 1]; its ends are rounded outwards to them."""
_LOWEST = -1e300
"""Stands for the log of nothing: a bet of a stream that met what it was certain not to meet."""


@dataclass
class EProcess:
    """Evidence in a stream of losses that their mean is above, or below, a limit."""

    limit: float
    """The mean in the claim, strictly between 0 and 1."""
    side: Side
    """`above`: evidence against "the mean is at most the limit", for an alarm. `below`: evidence
    against "it is at least the limit", for a certificate."""
    restarts: bool = False
    """Whether new bets start at each power of two of answers (the j-th with a share 1 / (j (j + 1))
    of the wealth), so that a change after a long good time is noticed."""
    num_seen: int = 0
    """Losses so far."""
    log_bets: list[list[float]] = field(default_factory=list)
    """[S, J] log wealth of each start and bet."""

    def __post_init__(self) -> None:
        """Refuse a limit that nothing can be bet on."""
        if not 0.0 < self.limit < 1.0:
            raise ValueError(f"the limit is {self.limit:g}; choose it between 0 and 1")
        if not self.log_bets:
            self.log_bets = [[0.0] * len(BETS)]

    def update(self, losses: Sequence[float] | Array) -> float:
        """Take up losses in the order in which they came; returns the log of the wealth.

        Args:
            losses: [T] losses in [0, 1].
        """
        for piece in self._pieces(checked_losses(losses)):
            gains = log_gains(piece, self.limit, self.side).sum(axis=0)  # [J]
            bets = np.maximum(np.asarray(self.log_bets) + gains, _LOWEST)
            self.log_bets = bets.tolist()
            self.num_seen += len(piece)
            if self._starts_next():
                self.log_bets.append([0.0] * len(BETS))
        return self.log_wealth

    @property
    def log_wealth(self) -> float:
        """The log of the wealth now; 0 before the first loss."""
        each = special.logsumexp(np.asarray(self.log_bets), axis=1) - math.log(len(BETS))  # [S]
        if not self.restarts:
            return float(each[0])
        shares = start_shares(len(each))
        kept = 1.0 - float(shares.sum())  # what later starts will bet
        return float(special.logsumexp(np.append(each, 0.0), b=np.append(shares, kept)))

    def exceeds(self, delta: float) -> bool:
        """Whether the claim is refuted now, at an error rate of delta over all times.

        Args:
            delta: probability with which a true claim is ever refuted.
        """
        return self.log_wealth >= -math.log(delta)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for `from_state`."""
        return {
            "limit": self.limit,
            "side": self.side,
            "restarts": self.restarts,
            "num_seen": self.num_seen,
            "log_bets": [list(row) for row in self.log_bets],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> EProcess:
        """An e-process that goes on where another was.

        Args:
            state: what `state_dict` gave.
        """
        return cls(**state)

    def _starts_next(self) -> bool:
        """Whether new bets start now: after 1, 2, 4, ... losses."""
        return self.restarts and self.num_seen & (self.num_seen - 1) == 0

    def _pieces(self, values: Array) -> list[Array]:
        """The losses, cut where new bets start."""
        if not self.restarts:
            return [values]
        ends, place = [], 1
        while place < self.num_seen + len(values):
            if place > self.num_seen:
                ends.append(place - self.num_seen)
            place *= 2
        return np.split(values, ends)


@dataclass
class Monitor:
    """Watches the answers of a certified prompt, and alarms when its rate is above the limit.

    While the mean loss stays at or below the limit, the probability that it ever alarms is at most
    delta, however long it watches. An alarm stays: later good answers do not take it back.
    """

    limit: float
    """The certified mean."""
    delta: float
    """Probability of an alarm without a reason, over all times."""
    evidence: EProcess = field(init=False)
    """The bets."""
    alarmed_at: int | None = None
    """Number of answers after which it alarmed; None = it has not."""

    def __post_init__(self) -> None:
        """Start watching."""
        if not 0.0 < self.delta < 1.0:
            raise ValueError(f"delta is {self.delta:g}; choose it between 0 and 1")
        self.evidence = EProcess(self.limit, "above", restarts=True)

    def observe(self, loss: float) -> bool:
        """Take up the loss of one answer; returns whether there is, or was, an alarm.

        Args:
            loss: loss in [0, 1].
        """
        self.evidence.update([loss])
        if self.alarmed_at is None and self.evidence.exceeds(self.delta):
            self.alarmed_at = self.evidence.num_seen
        return self.alarmed_at is not None

    def state_dict(self) -> dict[str, Any]:
        """Plain values for `from_state`."""
        return {
            "limit": self.limit,
            "delta": self.delta,
            "alarmed_at": self.alarmed_at,
            "evidence": self.evidence.state_dict(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Monitor:
        """A monitor that goes on where another was.

        Args:
            state: what `state_dict` gave.
        """
        monitor = cls(state["limit"], state["delta"], alarmed_at=state["alarmed_at"])
        monitor.evidence = EProcess.from_state(state["evidence"])
        return monitor


class Sequences(NamedTuple):
    """Limits of a mean after each loss."""

    low: Array
    """[T]."""
    high: Array
    """[T]."""


def confidence_sequence(losses: Sequence[float] | Array, delta: float) -> Sequences:
    """Limits of a mean after each loss, all of them right at once with probability 1 - delta.

    The means that neither side's bets have ever refuted at delta / 2. Waudby-Smith and Ramdas 2024.

    Args:
        losses: [T] losses in [0, 1], in the order in which they came.
        delta: probability with which the mean ever lies outside.
    """
    values = checked_losses(losses)
    means = np.linspace(0.0, 1.0, _MEANS + 1)[1:-1]  # [M]
    bar = math.log(2 / delta)
    low, high = np.zeros(len(values)), np.ones(len(values))
    for mean in means:
        above = _first(running_log_wealth(values, float(mean), "above") >= bar)
        below = _first(running_log_wealth(values, float(mean), "below") >= bar)
        low[above:] = np.maximum(low[above:], mean)
        high[below:] = np.minimum(high[below:], mean)
    return Sequences(low, high)


def running_log_wealth(values: Array, limit: float, side: Side) -> Array:
    """The log of the wealth of `EProcess` without restarts after each loss.

    Args:
        values: [..., T] losses in [0, 1]; streams stand side by side.
        limit: mean in the claim.
        side: what is bet on; see `EProcess`.

    Returns:
        [..., T] logs.
    """
    bets = np.cumsum(log_gains(values, limit, side), axis=-2)  # [..., T, J]
    return np.asarray(special.logsumexp(bets, axis=-1) - math.log(len(BETS)))


def log_gains(values: Array, limit: float, side: Side) -> Array:
    """The log of the factor by which each loss changes each bet.

    Args:
        values: [..., T] losses in [0, 1].
        limit: mean in the claim.
        side: what is bet on; see `EProcess`.

    Returns:
        [..., T, J] logs.
    """
    gains = (values - limit) / limit if side == "above" else (limit - values) / (1.0 - limit)
    return np.asarray(np.log1p(gains[..., None] * BETS))


def start_shares(count: int) -> Array:
    """The share of the wealth that each start bets: 1/2, 1/6, 1/12, ..., which sum up to 1.

    Args:
        count: number of starts.
    """
    places = np.arange(1, count + 1, dtype=np.float64)
    return 1.0 / (places * (places + 1.0))


def _first(reached: NDArray[np.bool_]) -> int:
    """The first time at which it is so, or the number of times when it never is."""
    return int(np.argmax(reached)) if bool(reached.any()) else len(reached)
