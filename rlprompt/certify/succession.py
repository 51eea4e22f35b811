"""Which prompt of a run is kept where it must be shown to be better than another.

The prompt that a run begins with is kept at first. Each evaluation's prompt is a candidate, tested
once on the paired values of the validation queries, against one of two:

- `start`: the prompt that the run began with. Of the candidates that are accepted, the one with the
  highest mean is kept. The probability that a prompt is kept that is not better than the start is
  at most `alpha`; which of those that are better is best is an estimate.
- `kept`: the prompt that is kept at the moment, which an accepted candidate replaces. The
  probability that a run ever replaces a prompt by one that is not better is at most `alpha`.

A run learns from training queries, so its prompts are the same whatever the tests say, and all may
meet the same queries. Against the start, the hypotheses are fixed beforehand, and the level of one
that was refuted passes to the next (the fallback procedure, Wiens 2003, a Bonferroni procedure that
holds under any dependence: Bretz, Maurer, Brannath and Posch, Statistics in Medicine 2009). Against
the kept prompt, every pair of prompts is a hypothesis (`Acceptance.fixed`).

An evaluation is drawn whole whatever a test says, because it also draws the curve. So the test has
a fixed size, which finds more than one that may be looked at any time: without a `spread`, the
exact sign test of "better on more queries than worse" (Arbuthnott 1710; Conover, Practical
Nonparametric Statistics, 3.4), ties left out. With a `spread`, the mean is compared by
`PairedTest`, which is valid for any bounded values and needs many queries.

Members of a population share the population's alpha. With `start` each gets an equal part for its
own candidates, and the highest mean is chosen among the members. With `kept` half of alpha is so
divided, and the other half is for tests between members: the first member's prompt is the
incumbent, and each later member's has one test against it. What a member keeps depends on the
queries, but it is one of few prompts that do not: each has a share of its member, half for the
start and half for its candidates as the run's own test divides it. A pair's level is the test's
level times both shares, and the sum over all pairs is at most the test's level.

Assumed and broken by: `certify.acceptance`. In particular a user who reads the tests and begins
another run because of them makes candidates that no run counts.

Letters: Q queries, n completions of each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import special

from rlprompt.certify.acceptance import Acceptance, PairedTest, queries_to_accept
from rlprompt.certify.comparison import Scores, query_means

Against = Literal["start", "kept"]
RESERVE = 0.1
"""Share of alpha for candidates beyond the announced number, of a run that is made longer."""


class Decision(NamedTuple):
    """How one test of a candidate ended."""

    accepted: bool
    """Whether it is shown to be better."""
    difference: float | None
    """Mean difference over all queries; None where none could be scored under both."""
    p_value: float
    """Of "not better"."""


def decide(ours: Scores, theirs: Scores, level: float, spread: float | None) -> Decision:
    """Whether one prompt is shown to be better than another.

    Args:
        ours: values of the candidate, [Q, n].
        theirs: values of the other on the same queries and draws, [Q, n].
        level: probability of accepting a candidate that is not better.
        spread: largest absolute difference of a query's values; None = which is better counts.

    Raises:
        ValueError: a difference is beyond the spread.
    """
    differences = query_means(ours - theirs)
    known = differences[~np.isnan(differences)]
    if not len(known):
        return Decision(False, None, 1.0)
    if spread is None:
        wins, losses = int((known > 0).sum()), int((known < 0).sum())
        p_value = float(special.bdtrc(wins - 1, wins + losses, 0.5)) if wins else 1.0
        return Decision(p_value <= level, float(known.mean()), p_value)
    test = PairedTest(level, spread, miss_rate=None)
    accepted = test.update(known) == "accept"
    return Decision(accepted, float(known.mean()), test.p_value)


def fewest_queries(level: float, spread: float | None) -> int:
    """Queries on which a candidate is accepted if it is better on each, by the spread if any.

    Args:
        level: level of the test.
        spread: largest absolute difference of a query's values; None = none is known.
    """
    return queries_to_accept(level) if spread is not None else math.ceil(-math.log2(level))


@dataclass(frozen=True)
class Challenge:
    """How a candidate's test in a run ended."""

    step: int
    """The candidate: the step of its evaluation."""
    against: int
    """Step of the prompt that it was tested against."""
    accepted: bool
    """Whether it is shown to be better than that."""
    kept: bool
    """Whether it is the kept prompt from then on."""
    difference: float | None
    """As of `Decision`."""
    level: float
    """Probability of accepting it if it is not better."""
    p_value: float
    """As of `Decision`."""


@dataclass
class Succession:
    """The kept prompt of one run, and every test that was made of a candidate; plain values."""

    acceptance: Acceptance
    """What hands out levels."""
    against: Against = "start"
    """What candidates are tested against."""
    kept: int = 0
    """Step of the prompt that is kept."""
    challenges: list[Challenge] = field(default_factory=list)
    """Every test so far."""

    @classmethod
    def announced(
        cls, num_candidates: int, alpha: float, spread: float | None, against: Against = "start"
    ) -> Succession:
        """One that has met no candidate.

        Args:
            num_candidates: number of evaluations that are planned; more may come, at the levels
                that `RESERVE` leaves.
            alpha: probability of ever keeping a prompt that is not better.
            spread: largest absolute difference of a query's values; None = none is known.
            against: prompt that candidates are tested against.
        """
        pairs = against == "kept"
        acceptance = Acceptance(
            alpha, num_candidates, spread=spread, miss_rate=None, fixed=pairs, reserve=RESERVE
        )
        return cls(acceptance, against)

    @property
    def opponent(self) -> int:
        """Step of the prompt that the next candidate is tested against."""
        return 0 if self.against == "start" else self.kept

    def challenge(self, step: int, ours: Scores, opponent: Scores) -> Challenge:
        """Test a candidate, once.

        Args:
            step: step of the candidate.
            ours: values of the candidate, [Q, n].
            opponent: values of the prompt of step `opponent` on the same queries and draws, [Q, n].

        Raises:
            ValueError: a difference is beyond the spread; nothing has changed then.
        """
        acceptance = copy.copy(self.acceptance)
        test = acceptance.begin()
        found = decide(ours, opponent, test.level, acceptance.spread)
        test.decision = "accept" if found.accepted else "reject"
        acceptance.close(test)
        kept = found.accepted and self._is_highest(found.difference)
        made = Challenge(
            step, self.opponent, found.accepted, kept, found.difference, test.level, found.p_value
        )
        self.acceptance = acceptance
        self.challenges.append(made)
        self.kept = step if kept else self.kept
        return made

    def _is_highest(self, difference: float | None) -> bool:
        """Whether an accepted candidate is above the kept one, if both are held to the start."""
        if self.against == "kept" or not self.kept:
            return True
        known = next(each.difference for each in self.challenges if each.step == self.kept)
        return (difference or 0.0) > (known or 0.0)

    @property
    def weight(self) -> float:
        """Share of the kept prompt among all that this run can keep; they sum to 1 at most."""
        places = [i for i, each in enumerate(self.challenges, start=1) if each.kept]
        return self.acceptance.share(places[-1]) / 2.0 if places else 0.5

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values for `from_state`."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Succession:
        """One that goes on where another was.

        Args:
            state: what `state_dict` gave.
        """
        return cls(
            Acceptance.from_state(state["acceptance"]),
            state["against"],
            state["kept"],
            [Challenge(**each) for each in state["challenges"]],
        )


class Member(NamedTuple):
    """What a member of a population has kept."""

    name: str
    scores: Scores
    """Its values, [Q, n]."""
    weight: float
    """As `Succession.weight` has it."""


@dataclass(frozen=True)
class MemberChallenge:
    """How the test of one member against another ended."""

    member: str
    """The candidate."""
    against: str
    """The incumbent."""
    accepted: bool
    """Whether the candidate is the incumbent from then on."""
    difference: float | None
    """As of `Decision`."""
    level: float
    """Probability of accepting it if it is not better."""
    p_value: float
    """As of `Decision`."""


def member_alpha(alpha: float, num_members: int, against: Against) -> float:
    """What a member of a population may spend on its own candidates.

    Args:
        alpha: probability for the whole population.
        num_members: number of members, at least 1.
        against: prompt that candidates are tested against.
    """
    between = 2.0 if against == "kept" and num_members > 1 else 1.0
    return alpha / (between * num_members)


def compete(
    members: Sequence[Member], alpha: float, spread: float | None, num_members: int
) -> list[MemberChallenge]:
    """Test each member's prompt against the incumbent, at first the first member's.

    Args:
        members: members that have come to an end, in the recipe's order.
        alpha: probability for the whole population, of which half is spent here.
        spread: largest absolute difference of a query's values; None = none is known.
        num_members: number of members of the population, those that failed included.

    Raises:
        ValueError: a difference is beyond the spread.
    """
    challenges: list[MemberChallenge] = []
    incumbent = members[0]
    for place, member in enumerate(members[1:], start=1):
        level = alpha / (2.0 * (num_members - 1) * place) * member.weight * incumbent.weight
        found = decide(member.scores, incumbent.scores, level, spread)
        challenges.append(
            MemberChallenge(
                member.name, incumbent.name, found.accepted, found.difference, level, found.p_value
            )
        )
        incumbent = member if found.accepted else incumbent
    return challenges


def planned_evaluations(steps: int, every: int) -> int:
    """How many prompts a run evaluates after its start, at most.

    Args:
        steps: number of steps.
        every: steps between evaluations; the last step has one of its own.
    """
    return math.ceil(steps / every)
