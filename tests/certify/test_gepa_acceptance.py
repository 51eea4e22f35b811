"""The acceptance test as GEPA's criterion, in the real package: no language model is called."""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlprompt.certify.acceptance import Acceptance
from rlprompt.certify.gepa_acceptance import FreshAcceptance

gepa = pytest.importorskip("gepa", reason="the extra `gepa`")

from gepa.core.adapter import EvaluationBatch  # noqa: E402
from gepa.strategies.acceptance import (  # noqa: E402
    AcceptanceCriterion,
    StrictImprovementAcceptance,
)


class Coins:
    """An adapter: a candidate's text is the chance of each score of 1."""

    propose_new_texts = None

    def __init__(self, seed: int, chances: Sequence[float]) -> None:
        self._draw = random.Random(seed)
        self._chances = iter(chances)

    def scores(self, candidate: Mapping[str, str], batch: Sequence[Any]) -> list[float]:
        chance = float(candidate["prompt"].split()[0])
        return [float(self._draw.random() < chance) for _ in batch]

    def evaluate(
        self, batch: list[Any], candidate: dict[str, str], capture_traces: bool = False
    ) -> EvaluationBatch[Any, Any]:
        scores = self.scores(candidate, batch)
        return EvaluationBatch(outputs=list(batch), scores=scores, trajectories=list(batch))

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: Any, components_to_update: list[str]
    ) -> dict[str, list[dict[str, Any]]]:
        return {name: [{"Feedback": "none"}] for name in components_to_update}

    def propose(
        self, candidate: dict[str, str], reflective_dataset: Any, components_to_update: list[str]
    ) -> dict[str, str]:
        return {"prompt": f"{next(self._chances)} {self._draw.random()}"}


def search(criterion: Any, adapter: Coins, calls: int) -> Any:
    return gepa.optimize(
        seed_candidate={"prompt": "0.5"},
        trainset=list(range(30)),
        valset=list(range(30, 36)),
        adapter=adapter,
        custom_candidate_proposer=adapter.propose,
        acceptance_criterion=criterion,
        candidate_selection_strategy="current_best",
        skip_perfect_score=False,
        max_metric_calls=calls,
        seed=0,
    )


def fresh(adapter: Coins, acceptance: Acceptance | None = None) -> FreshAcceptance:
    kept_apart = list(range(100, 6100))
    return FreshAcceptance(adapter.scores, kept_apart, acceptance, batch=20)


def test_it_is_what_gepa_asks_for() -> None:
    assert isinstance(fresh(Coins(0, [])), AcceptanceCriterion)


def test_of_proposals_that_change_nothing_none_is_accepted_where_gepa_takes_many() -> None:
    adapter = Coins(0, [0.5] * 400)
    theirs = search(StrictImprovementAcceptance(), adapter, 300)
    assert len(theirs.candidates) > 5
    adapter = Coins(0, [0.5] * 400)
    criterion = fresh(adapter)
    ours = search(criterion, adapter, 3000)
    assert len(ours.candidates) == 1
    assert criterion.acceptance.num_begun >= 2
    assert 0 < criterion.num_evaluations < ours.total_metric_calls


def test_a_better_proposal_is_accepted() -> None:
    adapter = Coins(1, [0.5, 0.95, *[0.5] * 400])
    criterion = fresh(adapter, Acceptance(min_effect=0.2))
    found = search(criterion, adapter, 1500)
    assert [text["prompt"].split()[0] for text in found.candidates] == ["0.5", "0.95"]
    assert criterion.acceptance.num_accepted == 1


class State:
    """What the criterion reads of a `GEPAState`."""

    def __init__(self, chances: Sequence[str]) -> None:
        self.program_candidates = [{"prompt": text} for text in chances]
        self.prog_candidate_val_subscores = [{0: float(text)} for text in chances]
        self.total = 0

    def increment_evals(self, count: int) -> None:
        self.total += count


class Proposal:
    """What it reads of a `CandidateProposal`."""

    def __init__(self, text: str, parents: Sequence[int] = (0,), after: float = 1.0) -> None:
        self.candidate = {"prompt": text}
        self.parent_program_ids = list(parents)
        self.subsample_scores_before = [0.0, 0.0]
        self.subsample_scores_after = [0.0, after]


def test_the_same_question_is_tested_once_and_counts_in_the_budget() -> None:
    criterion, state = fresh(Coins(2, [])), State(["0.4"])
    first = criterion.should_accept(Proposal("0.6"), state)
    asked = criterion.num_evaluations
    assert criterion.should_accept(Proposal("0.6"), state) == first
    assert "fresh examples, anytime p = " in criterion.reject_reason(Proposal("0.6"), state)
    assert criterion.num_evaluations == asked == state.total > 0
    assert criterion.acceptance.num_begun == 1


def test_what_fails_on_its_own_minibatch_costs_no_example() -> None:
    criterion, state = fresh(Coins(2, [])), State(["0.4"])
    assert not criterion.should_accept(Proposal("0.9", after=0.0), state)
    assert criterion.num_evaluations == criterion.acceptance.num_begun == 0
    assert "own minibatch" in criterion.reject_reason(Proposal("0.9", after=0.0), state)


def test_a_merge_must_beat_its_best_parent() -> None:
    criterion, state = fresh(Coins(3, [])), State(["0.1", "0.9"])
    assert not criterion.should_accept(Proposal("0.5", parents=(0, 1)), state)


def test_examples_are_used_up_unless_they_are_reused() -> None:
    state = State(["0.0"])
    few = FreshAcceptance(Coins(4, []).scores, list(range(20)), batch=20)
    assert few.should_accept(Proposal("1.0"), state)
    assert not few.should_accept(Proposal("1.0 again"), state)
    assert "No fresh examples" in few.reject_reason(Proposal("1.0 again"), state)
    again = FreshAcceptance(Coins(4, []).scores, list(range(20)), Acceptance(reuse=True), batch=20)
    assert again.should_accept(Proposal("1.0"), state)
    assert again.should_accept(Proposal("1.0 again"), state)
    short = FreshAcceptance(Coins(4, []).scores, [1, 2], Acceptance(reuse=True))
    assert not short.should_accept(Proposal("1.0"), state)
    assert "Undecided" in short.reject_reason(Proposal("1.0"), state)
    one = FreshAcceptance(Coins(4, []).scores, list(range(60)), Acceptance(num_candidates=1))
    assert one.should_accept(Proposal("1.0"), state)
    assert "All 1 announced" in one.reject_reason(Proposal("1.0 again"), state)


def test_state_goes_through_json() -> None:
    state = State(["0.5"])
    criterion = fresh(Coins(5, []))
    criterion.should_accept(Proposal("0.5 a"), state)
    again = fresh(Coins(5, []))
    again.load_state_dict(json.loads(json.dumps(criterion.state_dict())))
    assert again.state_dict() == criterion.state_dict()
    asked = again.num_evaluations
    again.should_accept(Proposal("0.5 a"), state)
    assert again.num_evaluations == asked


def test_wrong_use_is_told() -> None:
    with pytest.raises(ValueError, match="0 examples"):
        FreshAcceptance(Coins(0, []).scores, [])
    short = FreshAcceptance(lambda candidate, batch: [1.0], list(range(20)))
    with pytest.raises(ValueError, match="evaluate gave 1 scores for 8 examples"):
        short.should_accept(Proposal("1.0"), State(["0.0"]))


def test_it_imports_nothing_of_ours_but_the_test() -> None:
    import rlprompt.certify.gepa_acceptance as module

    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    ours = {name for name in names if name and name.startswith("rlprompt")}
    assert ours == {"rlprompt.certify.acceptance"}
