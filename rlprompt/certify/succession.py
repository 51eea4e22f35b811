"""Which prompt of a run is kept where each must be shown to be better than the one it replaces.

The prompt that a run begins with is the first incumbent. Each evaluation's prompt is a candidate,
tested on the paired values of the validation queries; it succeeds the incumbent only where it is
accepted. A run learns from training queries, so its prompts are the same whatever the tests say
(`Acceptance.fixed`), and all of them may meet the same queries: the probability that a run ever
keeps a prompt that is not better than the one it replaced is at most `alpha`.

Members of a population compete in the same way. Half of the population's alpha is divided equally
among the members for their own candidates. The other half is for tests between members: the first
member's prompt is the incumbent, and each later member's has one test against it. What a member
keeps depends on the queries, but it is one of few prompts that do not: each has a share of its
member, half for the start and half for its candidates as the run's own test divides it. A pair's
level is the test's level times both shares, and the sum over all pairs is at most the test's level.

Assumed and broken by: `certify.acceptance`. In particular a user who reads the tests and begins
another run because of them makes candidates that no run counts.

Letters: Q queries, n completions of each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rlprompt.certify.acceptance import Acceptance, PairedTest
from rlprompt.certify.comparison import Scores, query_means

RESERVE = 0.1
"""Share of alpha for candidates beyond the announced number, of a run that is made longer."""


@dataclass(frozen=True)
class Challenge:
    """How a candidate's test against the incumbent ended."""

    step: int
    """The candidate: the step of its evaluation."""
    against: int
    """The incumbent's step."""
    accepted: bool
    """Whether the candidate is the incumbent from then on."""
    difference: float | None
    """Mean difference over all queries; None where none could be scored under both."""
    num_queries: int
    """Queries that the test counted; fewer than there are where it was decided early."""
    level: float
    """Probability of accepting it if it is not better."""
    p_value: float
    """Anytime-valid, of "not better"."""


def paired_challenge(test: PairedTest, ours: Scores, theirs: Scores) -> tuple[bool, float | None]:
    """Decide a test by all queries at once; whether it accepts, and the mean difference.

    Args:
        test: a test that has met no query.
        ours: values of the candidate, [Q, n].
        theirs: values of the incumbent on the same queries and draws, [Q, n].

    Raises:
        ValueError: a difference is beyond the test's spread.
    """
    differences = query_means(ours - theirs)
    known = differences[~np.isnan(differences)]
    decision = test.update(known)
    return decision == "accept", float(known.mean()) if len(known) else None


@dataclass
class Succession:
    """The incumbent of one run, and every test that was made of a candidate; plain values."""

    acceptance: Acceptance
    incumbent: int = 0
    """Step of the prompt that is kept."""
    challenges: list[Challenge] = field(default_factory=list)

    @classmethod
    def announced(cls, num_candidates: int, alpha: float, spread: float | None) -> Succession:
        """One that has met no candidate.

        Args:
            num_candidates: number of evaluations that are planned; more may come, at the levels
                that `RESERVE` leaves.
            alpha: probability of ever keeping a prompt that is not better than the one before it.
            spread: largest absolute difference of a query's values; None = which is better counts.
        """
        return cls(
            Acceptance(
                alpha, num_candidates, spread=spread, miss_rate=None, fixed=True, reserve=RESERVE
            )
        )

    def challenge(self, step: int, ours: Scores, incumbent: Scores) -> bool:
        """Test a candidate once; returns whether it is the incumbent now.

        Args:
            step: step of the candidate.
            ours: values of the candidate, [Q, n].
            incumbent: values of the incumbent on the same queries and draws, [Q, n].

        Raises:
            ValueError: a difference is beyond the spread; nothing has changed then.
        """
        acceptance = copy.copy(self.acceptance)
        test = acceptance.begin()
        accepted, difference = paired_challenge(test, ours, incumbent)
        acceptance.close(test)
        self.acceptance = acceptance
        self.challenges.append(
            Challenge(
                step, self.incumbent, accepted, difference, test.num_queries, test.level,
                test.p_value,
            )
        )  # fmt: skip
        if accepted:
            self.incumbent = step
        return accepted

    @property
    def weight(self) -> float:
        """Share of the incumbent among all prompts that this run can keep; they sum to 1."""
        places = [i for i, each in enumerate(self.challenges, start=1) if each.accepted]
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
            state["incumbent"],
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
    """Mean difference over all queries; None where none could be scored under both."""
    level: float
    """Probability of accepting it if it is not better."""
    p_value: float
    """Anytime-valid, of "not better"."""


def member_alpha(alpha: float, num_members: int) -> float:
    """What a member of a population may spend on its own candidates.

    Args:
        alpha: probability for the whole population.
        num_members: number of members, at least 1.
    """
    return alpha if num_members == 1 else alpha / (2.0 * num_members)


def compete(
    members: Sequence[Member], alpha: float, spread: float | None, num_members: int
) -> list[MemberChallenge]:
    """Test each member's prompt against the incumbent, at first the first member's.

    Args:
        members: members that have come to an end, in the recipe's order.
        alpha: probability for the whole population, of which half is spent here.
        spread: as of `Succession.announced`.
        num_members: number of members of the population, those that failed included.

    Raises:
        ValueError: a difference is beyond the spread.
    """
    challenges: list[MemberChallenge] = []
    incumbent = members[0]
    for place, member in enumerate(members[1:], start=1):
        level = alpha / (2.0 * (num_members - 1) * place) * member.weight * incumbent.weight
        test = PairedTest(level, spread, miss_rate=None)
        accepted, difference = paired_challenge(test, member.scores, incumbent.scores)
        challenges.append(
            MemberChallenge(
                member.name, incumbent.name, accepted, difference, level, test.p_value
            )
        )
        incumbent = member if accepted else incumbent
    return challenges


def planned_evaluations(steps: int, every: int) -> int:
    """How many prompts a run evaluates after its start, at most.

    Args:
        steps: number of steps.
        every: steps between evaluations; the last step has one of its own.
    """
    return math.ceil(steps / every)
