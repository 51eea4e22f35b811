"""GEPA's loop as a function of what it was told so far.

GEPA (Agrawal et al., 2025, arXiv 2507.19457) owns its loop: `gepa.optimize` calls for evaluations
and returns at the end. A searcher is asked and told instead, and must go on from a checkpoint. So
the loop is run again from its beginning with all answers that are known, up to the first question
whose answer is not, and given up there. Nothing is left running between two steps: no thread, no
file, no pickle; a search that goes on and one that is resumed take the same path. All that GEPA
draws at random comes from a seed, so the same answers lead to the same question. What that costs
grows with the square of the calls: 0.2 seconds at the end of 2,000 calls, 2 at the end of 10,000.

Letters: C texts of a question (one, or parent and proposal), Q training queries.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from rlprompt.certify.acceptance import Acceptance
from rlprompt.certify.gepa_acceptance import FreshAcceptance
from rlprompt.errors import InputError, describe_error

_PART = "system"
"""GEPA's name of the one text that it changes."""

Example = Mapping[str, str]
"""What GEPA shows who reflects: `Inputs`, `Generated Outputs` and `Feedback` of a completion."""
Propose = Callable[[str, Sequence[Example], int], str | None]
"""(parent, its examples, number of the proposal) -> a new text; None = none that can be tried."""


@dataclass(frozen=True)
class Question:
    """Texts that GEPA wants to be tried on training queries."""

    texts: tuple[str, ...]
    """C different texts."""
    places: tuple[int, ...]
    """Q places in the list of training queries; one may be there twice."""


@dataclass
class Memory:
    """All that a loop was told, in the order in which it asked."""

    answers: list[NDArray[np.float64]] = field(default_factory=list)
    """Per question [C, Q]: rewards, NaN where it could not be said."""
    proposals: list[str | None] = field(default_factory=list)
    """What `Propose` gave."""
    examples: Sequence[Example] = ()
    """Of the last answer; whoever reflects needs no others."""


@dataclass(frozen=True)
class Standing:
    """Where a loop stands."""

    question: Question | None
    """What it wants to know next; None = it has come to its end."""
    best: str
    """The text that GEPA believes best: the highest mean on `Plan.ranking`."""
    parents: Mapping[str, str]
    """Each proposed text with the one that it was written from, in order."""


@dataclass(frozen=True)
class Plan:
    """What stays the same in all of a search."""

    start: str
    """The text that it begins with."""
    reflection: tuple[int, ...]
    """Places of the training queries that proposals are written from (GEPA's `trainset`)."""
    ranking: tuple[int, ...]
    """Places of those that accepted texts are ranked on (GEPA's `valset`)."""
    fresh: tuple[int, ...]
    """Places of those that proposals are tested on; empty = GEPA's own gate on its minibatch."""
    minibatch: int
    """Queries of a minibatch."""
    select: str
    """GEPA's `candidate_selection_strategy`."""
    perfect: float | None
    """Reward above which nothing is to be gained; None = there is none."""
    seed: int
    """Of all that GEPA draws."""
    acceptance: Acceptance | None = None
    """The test on `fresh`, before its first candidate."""
    num_proposals: int | None = None
    """Proposals after which it ends; None = no end."""


def load_gepa() -> ModuleType:
    """The package `gepa`.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("gepa")
    except ImportError as error:
        raise InputError(
            f"search.type gepa needs the package gepa ({error}); run `pip install 'rlprompt[gepa]'`"
        ) from error


def stand(plan: Plan, memory: Memory, propose: Propose) -> Standing:
    """Run the loop as far as its answers reach.

    Args:
        plan: plan of the search.
        memory: memory of what it was told; new proposals are added to it.
        propose: function that is called where a proposal is due that `memory` does not have.

    Raises:
        InputError: GEPA failed.
        ValueError: the answers are those of another search.
        Exception: what `propose` raised.
    """
    loop = _Loop(plan, memory, propose)
    question = None
    try:
        loop.run(load_gepa())
    except _Asked as asked:
        question = asked.question
    except _Failed as failed:
        raise failed.error from failed.error.__cause__
    except Exception as error:
        raise InputError(
            f"GEPA failed with {describe_error(error)}; report it with the recipe, or choose "
            "another search.type"
        ) from error
    if question is None and loop.num_answered < len(memory.answers):
        raise ValueError("it was told more than this search asks for")
    return Standing(question, loop.best, loop.parents)


class _Asked(BaseException):  # GEPA handles what is an `Exception` itself
    """Ends a loop at a question."""

    def __init__(self, question: Question) -> None:
        self.question = question


class _Failed(BaseException):
    """Carries an error past GEPA, which would try again or go on."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Loop:
    """One run of `gepa.optimize`: adapter, proposer, callback and stopper in one."""

    propose_new_texts = None

    def __init__(self, plan: Plan, memory: Memory, propose: Propose) -> None:
        self._plan, self._memory, self._propose = plan, memory, propose
        self.num_answered = 0
        self._num_proposed = 0
        self._lowest = math.inf
        self.best = plan.start
        self.parents: dict[str, str] = {}

    def run(self, gepa: ModuleType) -> None:
        """From the beginning to the end, or to a question.

        Raises:
            _Asked: an answer is missing.
            _Failed: it cannot go on.
        """
        plan = self._plan
        criterion: Any = "strict_improvement"
        if plan.acceptance is not None:
            criterion = _Fresh(self, list(plan.fresh), plan)
        gepa.optimize(
            seed_candidate={_PART: plan.start},
            trainset=list(plan.reflection),
            valset=list(plan.ranking),
            adapter=self,
            custom_candidate_proposer=self._new_texts,
            candidate_selection_strategy=plan.select,
            reflection_minibatch_size=plan.minibatch,
            skip_perfect_score=plan.perfect is not None,
            perfect_score=plan.perfect if plan.perfect is not None else math.inf,
            acceptance_criterion=criterion,
            stop_callbacks=self._is_over,
            callbacks=[self],
            logger=self,
            track_best_outputs=False,
            seed=plan.seed,
        )

    def log(self, message: str) -> None:
        """GEPA's console output: a run has displays of its own."""

    def told(self, question: Question) -> NDArray[np.float64]:
        """[C, Q] the answer to GEPA's next question.

        Raises:
            _Asked: nobody has told it yet.
            _Failed: what was told answers another question.
        """
        if self.num_answered == len(self._memory.answers):
            raise _Asked(question)
        answer = self._memory.answers[self.num_answered]
        if answer.shape != (len(question.texts), len(question.places)):
            raise _Failed(ValueError("it answers other questions than this search asks"))
        self.num_answered += 1
        return answer

    def evaluate(self, batch: list[int], candidate: dict[str, str], capture_traces: bool) -> Any:
        """What GEPA's adapters give: one score per query."""
        from gepa.core.adapter import EvaluationBatch

        (rewards,) = self.told(Question((candidate[_PART],), tuple(batch)))
        self._lowest = min(self._lowest, *(r for r in rewards if not math.isnan(r)), math.inf)
        # GEPA knows no missing score: what could not be scored counts as the worst that was seen.
        lowest = 0.0 if self._lowest == math.inf else self._lowest
        scores = [lowest if math.isnan(reward) else float(reward) for reward in rewards]
        return EvaluationBatch(outputs=list(batch), scores=scores, trajectories=list(batch))

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: Any, components_to_update: list[str]
    ) -> dict[str, list[dict[str, str]]]:
        """Examples of the parent on its minibatch: what was told last."""
        return {_PART: [dict(example) for example in self._memory.examples]}

    def on_valset_evaluated(self, event: Mapping[str, Any]) -> None:
        """GEPA has ranked an accepted text."""
        if event["is_best_program"]:
            self.best = event["candidate"][_PART]

    def _new_texts(
        self, candidate: dict[str, str], dataset: Mapping[str, Sequence[Example]], parts: list[str]
    ) -> dict[str, str]:
        """GEPA's `ProposalFn`: nothing where there is no text to try."""
        parent, proposals = candidate[_PART], self._memory.proposals
        if self._num_proposed == len(proposals):
            try:
                proposals.append(self._propose(parent, dataset[_PART], self._num_proposed))
            except Exception as error:  # GEPA would log it and go on without a proposal
                raise _Failed(error) from error
        text = proposals[self._num_proposed]
        self._num_proposed += 1
        if text is None or text == parent:
            return {}
        if text != self._plan.start:
            self.parents.setdefault(text, parent)
        return {_PART: text}

    def _is_over(self, state: Any) -> bool:
        """GEPA's stopper, asked before each of its iterations."""
        return self._num_proposed == self._plan.num_proposals


class _Fresh(FreshAcceptance):
    """Parent and proposal meet the same queries with the same random numbers."""

    def __init__(self, loop: _Loop, places: Sequence[int], plan: Plan) -> None:
        assert plan.acceptance is not None
        acceptance = Acceptance.from_state(plan.acceptance.state_dict())
        super().__init__(self._refuse, places, acceptance, seed=plan.seed)
        self._loop = loop

    def scores(
        self, candidates: Sequence[Mapping[str, str]], examples: Sequence[int]
    ) -> Sequence[Sequence[float]]:
        """See `FreshAcceptance.scores`; NaN where it could not be said."""
        texts = tuple(candidate[_PART] for candidate in candidates)
        rewards: list[list[float]] = self._loop.told(Question(texts, tuple(examples))).tolist()
        return rewards

    def should_accept(self, proposal: Any, state: Any) -> bool:
        """See `FreshAcceptance.should_accept`."""
        try:
            return super().should_accept(proposal, state)
        except ValueError as error:
            sentence = f"search.evidence.spread does not hold: {error}"
            raise _Failed(InputError(sentence)) from error

    @staticmethod
    def _refuse(candidate: Mapping[str, str], examples: list[int]) -> NoReturn:
        raise AssertionError("both are scored together")
