"""The acceptance test as an `AcceptanceCriterion` of GEPA (0.1): `gepa.optimize` takes it as it is.

GEPA's own rule compares sums over the minibatch that the proposal was written from, of three
examples by default; where a change changes nothing it accepts about a third of all proposals. This
one tests parent and proposal on examples that are kept apart, as many as the decision needs.

    from rlprompt.certify.gepa_acceptance import FreshAcceptance

    def evaluate(candidate, batch):
        return adapter.evaluate(batch, candidate).scores

    gepa.optimize(..., acceptance_criterion=FreshAcceptance(evaluate, kept_apart))

The examples must be in neither `trainset`, from which proposals are written, nor `valset`, by which
GEPA chooses. Each proposal uses up examples; when they are gone, nothing is accepted any more. With
`Acceptance(reuse=True)` each proposal may meet all of them, at smaller levels: see there for what
GEPA may then learn of them (whether a proposal was accepted, and nothing else). The calls count in
GEPA's budget. Nothing of GEPA is imported here, and nothing of rlprompt but `acceptance`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlprompt.certify.acceptance import Acceptance, PairedTest

Evaluate = Callable[[Mapping[str, str], list[Any]], Sequence[float]]
"""Candidate and examples -> one score per example, within the `spread` of each other."""


class FreshAcceptance:
    """Accepts a proposal that is shown to be better than its parent on fresh examples."""

    def __init__(
        self,
        evaluate: Evaluate,
        examples: Sequence[Any],
        acceptance: Acceptance | None = None,
        *,
        batch: int = 8,
        seed: int = 0,
    ) -> None:
        """Nothing is tested yet.

        Args:
            evaluate: function that scores a candidate on examples, anew each time.
            examples: kept apart from all that GEPA sees.
            acceptance: error rate and effect; None = 5% over the whole run.
            batch: examples between two looks.
            seed: seed of the order of the examples.

        Raises:
            ValueError: there are no examples, or a batch of none.
        """
        if not examples or batch < 1:
            raise ValueError(
                f"there are {len(examples)} examples in batches of {batch}; give one at least"
            )
        self.acceptance = acceptance or Acceptance()
        self.num_evaluations = 0
        """Scores that were asked for; they count in GEPA's budget too."""
        self._evaluate = evaluate
        self._examples = list(examples)
        self._batch = batch
        self._seed = seed
        self._order = _shuffled(len(self._examples), seed)
        self._decided: dict[tuple[tuple[str, str], ...], tuple[bool, str]] = {}

    def should_accept(self, proposal: Any, state: Any) -> bool:
        """GEPA's question, asked once per proposal or more often.

        Args:
            proposal: a `gepa` `CandidateProposal`.
            state: the `GEPAState`.
        """
        return self._decision(proposal, state)[0]

    def reject_reason(self, proposal: Any, state: Any) -> str:
        """What GEPA logs of a proposal that was not accepted.

        Args:
            proposal: the proposal, as of `should_accept`.
            state: the `GEPAState`.
        """
        return self._decision(proposal, state)[1]

    def scores(
        self, candidates: Sequence[Mapping[str, str]], examples: Sequence[Any]
    ) -> Sequence[Sequence[float]]:
        """Scores of both sides on the same examples, one after the other.

        Override it where both can be drawn together, with the same random numbers.

        Args:
            candidates: parent and proposal.
            examples: examples between two looks.
        """
        return [self._evaluate(who, list(examples)) for who in candidates]

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values for `load_state_dict`: a GEPA run that is resumed begins anew here."""
        return {
            "acceptance": self.acceptance.state_dict(),
            "num_evaluations": self.num_evaluations,
            "left": list(self._order),
            "decided": [[list(map(list, key)), *value] for key, value in self._decided.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, with the same examples.

        Args:
            state: what `state_dict` gave.
        """
        self.acceptance = Acceptance.from_state(state["acceptance"])
        self.num_evaluations = state["num_evaluations"]
        self._order = list(state["left"])
        self._decided = {
            tuple((name, text) for name, text in key): (accepted, reason)
            for key, accepted, reason in state["decided"]
        }

    def _decision(self, proposal: Any, state: Any) -> tuple[bool, str]:
        parent = state.program_candidates[_best_parent(proposal, state)]
        # The same text again is the same question: a second test would be a second chance.
        key = (
            *(("before " + name, text) for name, text in sorted(parent.items())),
            *(("after " + name, text) for name, text in sorted(proposal.candidate.items())),
        )
        if key not in self._decided:
            before = self.num_evaluations
            self._decided[key] = self._test(proposal, parent)
            state.increment_evals(self.num_evaluations - before)
        return self._decided[key]

    def _test(self, proposal: Any, parent: Mapping[str, str]) -> tuple[bool, str]:
        before, after = proposal.subsample_scores_before, proposal.subsample_scores_after
        if before and after and sum(after) <= sum(before):
            # What is rejected can be no false acceptance: this look costs nothing.
            return False, f"Not better on its own minibatch ({sum(before):g} -> {sum(after):g})"
        announced = self.acceptance.num_candidates
        if announced is not None and self.acceptance.num_begun >= announced:
            return False, f"All {announced} announced candidates have had their test"
        fresh = self._fresh_order()
        if not fresh:
            return False, "No fresh examples are left to test it on"
        test = self.acceptance.begin()
        while test.decision == "more" and fresh:
            places = fresh[: self._batch]
            del fresh[: self._batch]
            self._compare(test, proposal.candidate, parent, places)
        self.acceptance.close(test)
        return test.decision == "accept", _sentence(test)

    def _fresh_order(self) -> list[int]:
        """Places of the examples this proposal may meet; without reuse they are used up."""
        if self.acceptance.reuse:
            return _shuffled(len(self._examples), f"{self._seed}:{self.acceptance.num_begun}")
        return self._order

    def _compare(
        self,
        test: PairedTest,
        candidate: Mapping[str, str],
        parent: Mapping[str, str],
        places: Sequence[int],
    ) -> None:
        examples = [self._examples[place] for place in places]
        scores = [list(given) for given in self.scores((parent, candidate), examples)]
        for given in scores:
            if len(given) != len(examples):
                raise ValueError(
                    f"evaluate gave {len(given)} scores for {len(examples)} examples; give one each"
                )
        self.num_evaluations += 2 * len(examples)
        test.update([new - old for old, new in zip(*scores, strict=True)], places)


def _shuffled(count: int, seed: int | str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _best_parent(proposal: Any, state: Any) -> int:
    """The parent to beat: of several, as in a merge, that with the best mean on GEPA's valset."""

    def mean(parent: int) -> float:
        scores = list(state.prog_candidate_val_subscores[parent].values())
        return sum(scores) / len(scores) if scores else float("-inf")

    return int(max(proposal.parent_program_ids, key=mean))


def _sentence(test: PairedTest) -> str:
    said = {
        "accept": "Better",
        "reject": "Not shown to be better",
        "more": "Undecided when examples ran out",
    }
    return (
        f"{said[test.decision]}: mean difference {test.mean:+.3f} on {test.num_queries} fresh "
        f"examples, anytime p = {test.p_value:.2g}, level {test.level:.2g}"
    )
