"""Whether a candidate prompt replaces the incumbent: a paired test that may be looked at any time.

Both prompts answer the same queries; a query's difference is the candidate's reward minus the
incumbent's, with the query as the unit. The test bets on differences above zero. While the mean
difference is at most zero, wealth that starts at 1 ever reaches 1 / level with probability at most
`level` (Ville 1939; Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting", JRSS B 2024, arXiv 2010.09686): so it may be looked at after each query, stop at once,
or ask for more, and no number of queries is fixed before. A second bet, against "the candidate is
better by `min_effect`", drops the hopeless early; it can only reject, so it costs power and never
validity.

A run tries many candidates. `Acceptance` hands out levels so that the probability that the *run*
ever accepts a candidate that is not better than its incumbent is at most `alpha`:

- A known number K of candidates: alpha / K each (Bonferroni).
- An unknown number: the k-th gets alpha / (k (k + 1)), which sums to alpha.
- In both, the level of a candidate that was accepted passes to the next (the online fallback
  procedure: Tian and Ramdas, "Online control of the familywise error rate", 2021, arXiv
  1910.04900): where it was right, it used up nothing; where it was wrong, the error that is counted
  has happened.
- `reuse`: later candidates are tested on queries that earlier ones met. Each acceptance tells who
  proposes one bit about those queries, and the next proposal may exploit it. Nothing else of the
  test must reach the proposer. Then the k-th candidate, after a acceptances, is one of at most
  C(k - 1, a) that the bits can lead to, fixed before the queries are looked at, and a union bound
  over all of them holds: the level is divided by C(k - 1, a) (k >= 1, and 2^-(a + 1) for a), and
  nothing is passed on. Until something is accepted, a run pays a factor of 2 for it.
- `fixed`: the candidates are the same whatever the tests say, as the checkpoints of a run that
  learns from other queries are; only the incumbent depends on them. Then each of the pairs of a
  candidate and an earlier prompt is a hypothesis of its own, fixed beforehand, and they may all
  meet the same queries. The level of the k-th candidate is divided among its k possible
  incumbents, half to the prompt that the run began with and half to the k - 1 others.
- `reserve`: a share of alpha that is put aside for candidates beyond the announced number, of which
  the m-th gets 1 / (m (m + 1)).

Assumed: a candidate's queries are independent draws, fresh to it (not those whose answers it was
written from), and differences lie within `spread`. Each query counts once per candidate: answers to
a query that was met before say nothing new about other queries, and are left out. Broken by
choosing queries by their scores, by a proposer that reads the test's scores under `reuse` or any of
its outcomes under `fixed`, and by queries that are variants of each other.

Letters: T queries, J bets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Decision = Literal["more", "accept", "reject"]
"""`more`: the evidence does not suffice, ask for further queries."""

_BETS = 0.95 * 0.75 ** np.arange(16)
"""[J] fractions of the wealth that are put on a query, from 0.95 down to 0.013. Wealth is shared
equally among them: no effect size has to be known, and the best of them costs a factor of 16."""


@dataclass
class PairedTest:
    """One candidate against one incumbent; plain values, to be pickled or written as JSON."""

    level: float
    """Probability of ever accepting a candidate that is not better."""
    spread: float | None = 1.0
    """Largest absolute difference of a query's rewards: 1 for rewards in [0, 1]. None = only which
    of the two is better counts, +1, -1 or 0 a query: for rewards without a known range. `better`
    then means better on more queries, whatever by how much."""
    min_effect: float = 0.1
    """Smallest mean difference worth finding, in units of the reward; without a spread, share of
    queries won less share of queries lost."""
    miss_rate: float | None = 0.1
    """Probability of rejecting as hopeless a candidate that is better by `min_effect`; None = none
    is rejected, and `min_effect` is not read: for answers that are drawn anyway."""
    max_queries: int | None = None
    """Queries after which an undecided candidate is rejected; None = never for that reason."""
    num_queries: int = 0
    """Queries that were counted."""
    total: float = 0.0
    """Sum of their differences."""
    decision: Decision = "more"
    """What the evidence says; `accept` and `reject` are final."""
    log_for: list[float] = field(default_factory=lambda: [0.0] * len(_BETS))
    """[J] log wealth of the bets on a difference above zero."""
    log_against: list[float] = field(default_factory=lambda: [0.0] * len(_BETS))
    """[J] log wealth of the bets on a difference below `min_effect`."""
    met: list[int | str] = field(default_factory=list)
    """Names of the queries that were counted, where they were given."""

    def __post_init__(self) -> None:
        """Refuse what no test can be made of.

        Raises:
            ValueError: a number is out of its range.
        """
        miss_rate = 0.5 if self.miss_rate is None else self.miss_rate
        if not 0.0 < self.level < 1.0 or not 0.0 < miss_rate < 1.0:
            raise ValueError(
                f"level is {self.level:g} and miss_rate {miss_rate:g}; choose both between 0 and 1"
            )
        if self.spread is not None and not 0.0 < self.spread < math.inf:
            raise ValueError(f"spread is {self.spread:g}; give the largest difference there can be")
        effect_counts = self.miss_rate is not None
        if effect_counts and not 0.0 < self.min_effect < (self.spread or 1.0):
            raise ValueError(
                f"min_effect is {self.min_effect:g}; choose it between 0 and the spread, "
                f"{self.spread or 1.0:g}"
            )

    def update(
        self, differences: ArrayLike, queries: Sequence[int | str] | None = None
    ) -> Decision:
        """Take up differences in the order in which they came, up to the one that decides.

        Args:
            differences: [T] candidate's reward minus incumbent's per query, averaged over its
                completions; NaN = could not be scored, which is left out.
            queries: [T] names of the queries; one that was met before is left out. None where
                every query is known to be a new one.

        Raises:
            ValueError: a difference is beyond `spread`, or there is not one name per difference.
        """
        values = np.asarray(differences, dtype=np.float64).reshape(-1)
        fresh = self._fresh(values, queries)
        self._require_spread(values)
        if self.decision != "more" or not fresh:
            return self.decision
        counted = self._count(values[fresh])
        if queries is not None:
            self.met += [queries[place] for place in fresh[:counted]]
        return self.decision

    @property
    def mean(self) -> float:
        """Mean difference so far; NaN before the first query."""
        return self.total / self.num_queries if self.num_queries else math.nan

    @property
    def log_evidence(self) -> float:
        """Log of the wealth of the bets that the candidate is better; 0 at the start."""
        return float(_mixed(self.log_for))

    @property
    def p_value(self) -> float:
        """Anytime-valid p-value of "not better", at this moment: the inverse of the wealth."""
        return min(1.0, math.exp(-self.log_evidence))

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values for `from_state`."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PairedTest:
        """A test that goes on where another was.

        Args:
            state: what `state_dict` gave.
        """
        return cls(**copy.deepcopy(dict(state)))

    def _fresh(self, values: NDArray[np.float64], queries: Sequence[int | str] | None) -> list[int]:
        """Places of differences that are known and belong to queries not met before."""
        if queries is None:
            return [place for place, value in enumerate(values) if not math.isnan(value)]
        if len(queries) != len(values):
            raise ValueError(
                f"there are {len(values)} differences and {len(queries)} queries; give one name "
                "per difference"
            )
        met = set(self.met)
        fresh: list[int] = []
        for place, query in enumerate(queries):
            if query not in met and not math.isnan(values[place]):
                met.add(query)
                fresh.append(place)
        return fresh

    def _require_spread(self, values: NDArray[np.float64]) -> None:
        if self.spread is None:
            return
        beyond = np.abs(values) > self.spread * (1.0 + 1e-6)
        if beyond.any():
            raise ValueError(
                f"a difference is {float(values[beyond][0]):g}, beyond the spread of "
                f"{self.spread:g} that the test is valid for; state the range of the reward"
            )

    def _count(self, differences: NDArray[np.float64]) -> int:
        """Bet on differences [T] until one decides; returns how many were counted."""
        if self.spread is None:
            shares = np.sign(differences)[:, None]  # [T, 1]
        else:
            # Rounding of float32 rewards may lie beyond the spread by a hair.
            shares = np.clip(differences / self.spread, -1.0, 1.0)[:, None]  # [T, 1]
        effect = self.min_effect / (self.spread or 1.0)
        gains = np.log1p(_BETS * shares)  # [T, J]
        losses = np.log1p(-_BETS * (shares - effect) / (1.0 + effect))  # [T, J]
        logs_for = np.asarray(self.log_for) + np.cumsum(gains, axis=0)
        logs_against = np.asarray(self.log_against) + np.cumsum(losses, axis=0)
        accepts = _mixed(logs_for) >= -math.log(self.level)  # [T]
        rejects = np.zeros_like(accepts)
        if self.miss_rate is not None:
            rejects = _mixed(logs_against) >= -math.log(self.miss_rate)
        if self.max_queries is not None:
            rejects |= self.num_queries + 1 + np.arange(len(shares)) >= self.max_queries
        decided = np.flatnonzero(accepts | rejects)
        counted = int(decided[0]) + 1 if len(decided) else len(shares)
        self.log_for = logs_for[counted - 1].tolist()
        self.log_against = logs_against[counted - 1].tolist()
        self.num_queries += counted
        self.total += float(differences[:counted].sum())
        if len(decided):
            self.decision = "accept" if accepts[decided[0]] else "reject"
        return counted


@dataclass
class Acceptance:
    """Tests for the candidates of a whole run, which share one error rate."""

    alpha: float = 0.05
    """Probability that the run ever accepts a candidate that is not better than its incumbent."""
    num_candidates: int | None = None
    """How many candidates there will be at most; None = not known."""
    reuse: bool = False
    """Whether candidates are tested on queries that earlier candidates met, by a proposer that
    learns nothing of the tests but what was accepted."""
    spread: float | None = 1.0
    """As of `PairedTest`."""
    min_effect: float = 0.1
    """As of `PairedTest`."""
    miss_rate: float | None = 0.1
    """As of `PairedTest`."""
    max_queries: int | None = None
    """As of `PairedTest`."""
    num_begun: int = 0
    """Candidates that were given a test."""
    num_accepted: int = 0
    """Those that were accepted."""
    passed_on: float = 0.0
    """Level of the last candidate, if it was accepted."""
    fixed: bool = False
    """Whether the candidates are the same whatever is accepted; all may meet the same queries."""
    reserve: float = 0.0
    """Share of `alpha` for candidates beyond `num_candidates`; 0 = there must be none."""

    def __post_init__(self) -> None:
        """Refuse what no run can keep to.

        Raises:
            ValueError: a number is out of its range.
        """
        if not 0.0 < self.alpha < 1.0:
            raise ValueError(f"alpha is {self.alpha:g}; choose it between 0 and 1")
        if self.num_candidates is not None and self.num_candidates < 1:
            raise ValueError(f"num_candidates is {self.num_candidates}; give 1 at least, or None")
        if self.reuse and self.fixed:
            raise ValueError("fixed candidates cannot follow the tests; set reuse or fixed")
        if not 0.0 <= self.reserve < 1.0 or (self.reserve and self.num_candidates is None):
            raise ValueError(
                f"reserve is {self.reserve:g}; choose it from 0 to below 1, and announce a number "
                "of candidates beyond which it is for"
            )

    def share(self, place: int) -> float:
        """The share of `alpha` of a candidate, before what its history costs.

        Args:
            place: number of the candidate, from 1.
        """
        if self.num_candidates is None:
            return 1.0 / (place * (place + 1))
        if place <= self.num_candidates:
            return (1.0 - self.reserve) / self.num_candidates
        beyond = place - self.num_candidates
        return self.reserve / (beyond * (beyond + 1))

    @property
    def next_level(self) -> float:
        """The level of the next candidate's test."""
        share = self.share(self.num_begun + 1)
        if self.fixed:
            if self.num_accepted:
                return self.alpha * share / (2.0 * self.num_begun)
            return self.alpha * share / (2.0 if self.num_begun else 1.0)
        if self.reuse:
            histories = math.comb(self.num_begun, self.num_accepted)
            return self.alpha * share / histories / 2.0 ** (self.num_accepted + 1)
        return self.alpha * share + self.passed_on

    def begin(self) -> PairedTest:
        """The test of the next candidate.

        Raises:
            ValueError: there were as many candidates as were announced.
        """
        announced = self.num_candidates
        if announced is not None and self.num_begun >= announced and not self.reserve:
            raise ValueError(
                f"{announced} candidates were announced, and all have had their test; "
                "announce more, or None"
            )
        test = PairedTest(
            self.next_level, self.spread, self.min_effect, self.miss_rate, self.max_queries
        )
        self.num_begun += 1
        self.passed_on = 0.0
        return test

    def close(self, test: PairedTest) -> bool:
        """Note how the last test ended, once for each; returns whether its candidate is accepted.

        Args:
            test: what `begin` gave last. One that is not decided is given up, as rejected.
        """
        is_accepted = test.decision == "accept"
        if is_accepted:
            self.num_accepted += 1
            self.passed_on = 0.0 if self.reuse or self.fixed else test.level
        return is_accepted

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values for `from_state`."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Acceptance:
        """One that goes on where another was.

        Args:
            state: what `state_dict` gave.
        """
        return cls(**state)


def queries_to_accept(level: float) -> int:
    """Fewest queries on which a candidate can be accepted: it is better on each by the spread.

    Args:
        level: level of its test.
    """
    count, needed = 1, -math.log(level)
    while float(_mixed(count * np.log1p(_BETS))) < needed:
        count += 1
    return count


def _mixed(logs: ArrayLike) -> NDArray[np.float64]:
    """Log of the mean wealth of all bets: [..., J] -> [...]."""
    return np.asarray(np.logaddexp.reduce(logs, axis=-1) - math.log(len(_BETS)))
