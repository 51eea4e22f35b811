"""What replaces the incumbent, at one error rate for a whole search that goes on proposing.

A search proposes from scores, so the scores that a candidate was chosen by say too much for it.
Therefore the training queries are divided once, at random, and for good. *Fitness queries* are what
evolution runs on: all that proposes, drops and promotes reads them alone. *Test queries* decide
whether a promoted candidate replaces the incumbent, and nothing that they say reaches the proposer:
not even what was accepted. So the promoted candidates are the ones they would be whatever the test
queries said, and however often these are used again.

Of promoted candidates 1, 2, ... and the start, 0, each ordered pair has its bet that the one is
better than the other (`certify.acceptance.PairedTest`), each test query counting once per pair. The
k-th has 2 k - 1 pairs with earlier ones (the start challenges nobody), at alpha / (k (k + 1)
(2 k - 1)) each, which sums to alpha over all that a search may ever promote. With probability
1 - alpha no replacement is ever wrong, whenever it is looked at and whatever is tested in what
order. Nothing is passed on from test to test, and none is paid for what was accepted before, which
`certify.acceptance.Acceptance` needs where the proposer is told.

Assumed: test queries are draws from what the prompt is for, and their answers were used for
nothing else; differences lie within `spread`, where one is given.

Letters: S answers of test queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlprompt.certify.acceptance import PairedTest


class Answer(NamedTuple):
    """What a candidate scored on a test query."""

    block: int
    """Query and step: answers of one block were drawn with the same random numbers."""
    query: int
    score: float


class Terms(NamedTuple):
    """When a candidate counts as better; see `rlprompt.search.texts.EvidenceSettings`."""

    alpha: float
    spread: float | None
    min_effect: float
    miss_rate: float


def pair_level(alpha: float, one: int, other: int) -> float:
    """The probability of error that a pair of promoted candidates has, by their places.

    Args:
        alpha: probability of error of the whole search.
        one: place of a candidate; 0 = the start, k = the k-th that was promoted.
        other: place of the other.
    """
    k = max(one, other)
    return alpha / (k * (k + 1) * (2 * k - 1))


def paired_test(
    one: Sequence[Answer],
    other: Sequence[Answer],
    terms: Terms,
    level: float | None = None,
    shift: float = 0.0,
) -> PairedTest:
    """The evidence, in the order of the blocks, that one candidate is better than the other.

    Args:
        one: answers of the one.
        other: answers of the other; blocks that only one has are left out.
        terms: terms under which it counts as better.
        level: probability of error of this test; None = that of `terms`.
        shift: what the one is better by whatever their scores are, such as by a shorter text.

    Raises:
        ValueError: two scores of a block differ by more than the spread.
    """
    theirs = {answer.block: answer.score for answer in other}
    both = [answer for answer in one if answer.block in theirs]
    raw = [answer.score - theirs[answer.block] for answer in both]
    spread = terms.spread
    if spread is not None:
        beyond = [each for each in raw if abs(each) > spread * (1.0 + 1e-6)]
        if beyond:
            raise ValueError(
                f"a difference is {beyond[0]:g}, beyond the spread of {spread:g} that the test is "
                "valid for; state the range of the reward"
            )
        spread += abs(shift)
    test = PairedTest(
        terms.alpha if level is None else level, spread, terms.min_effect, terms.miss_rate
    )
    test.update([each + shift for each in raw], [answer.query for answer in both])
    return test


class Promotions:
    """The promoted candidates of a search, and which of them is the incumbent."""

    def __init__(self, terms: Terms) -> None:
        """The start, candidate 0, is the incumbent."""
        self._terms = terms
        self._promoted = [0]
        self.incumbent = 0

    @property
    def promoted(self) -> Sequence[int]:
        """Candidates by their places; the first is the start."""
        return tuple(self._promoted)

    def promote(self, candidate: int) -> None:
        """Let a candidate be tested from now on; one that was promoted before stays as it is."""
        if candidate not in self._promoted:
            self._promoted.append(candidate)

    def test(
        self, candidate: int, answers: Mapping[int, Sequence[Answer]], worth: Mapping[int, float]
    ) -> PairedTest:
        """The evidence that a promoted candidate is better than the incumbent.

        Args:
            candidate: candidate that was promoted.
            answers: answers by candidate, each in the order in which they came.
            worth: what each candidate is worth beside its scores, such as for a short text.

        Raises:
            ValueError: see `paired_test`.
        """
        places = (self._promoted.index(candidate), self._promoted.index(self.incumbent))
        level = pair_level(self._terms.alpha, *places)
        shift = worth.get(candidate, 0.0) - worth.get(self.incumbent, 0.0)
        pair = (answers.get(candidate, ()), answers.get(self.incumbent, ()))
        return paired_test(*pair, self._terms, level, shift)

    def update(
        self, answers: Mapping[int, Sequence[Answer]], worth: Mapping[int, float]
    ) -> Sequence[int]:
        """Replace the incumbent by what was shown to be better; arguments are those of `test`.

        Returns:
            The candidates whose test against the incumbent is still open.
        """
        for _ in self._promoted:
            tests = {each: self.test(each, answers, worth) for each in self._challengers}
            better = [each for each, test in tests.items() if test.decision == "accept"]
            if not better:
                return [each for each, test in tests.items() if test.decision == "more"]
            self.incumbent = max(better, key=lambda each: tests[each].log_evidence)
        return []

    @property
    def _challengers(self) -> Sequence[int]:
        return [each for each in self._promoted if each not in (0, self.incumbent)]

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values for `load_state_dict`."""
        return {"promoted": list(self._promoted), "incumbent": self.incumbent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._promoted = [int(each) for each in state["promoted"]]
        self.incumbent = int(state["incumbent"])
