"""A step of a search: what candidates meet, what the searcher is told, and what is logged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprompt.engines.native import NativeEngine
from rlprompt.errors import InputError
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.runs.learner import LearnerState
from rlprompt.search.base import Candidate, Trial
from rlprompt.search.step import SearchStep
from rlprompt.search.texts import Texts
from tests.fixtures.runs import gradient_step, tiny_policy, tiny_trainer
from tests.fixtures.searches import search_run, search_step, wandering_run


class Listening(Texts):
    """A race that keeps what it is told, and asks for the same text under two numbers."""

    def __init__(self) -> None:
        super().__init__(["the sun", "one line", "the sun "], 0.5, 100)
        self.told: list[list[Trial]] = []

    def ask(self) -> Sequence[Candidate]:
        first, second, _ = super().ask()
        return [first, second, Candidate(2, TextPrompt("the sun"))]

    def tell(self, trials: Sequence[Trial]) -> None:
        super().tell(trials)
        self.told.append(list(trials))


def listening_step(tmp_path: Path, **changes: Any) -> tuple[SearchStep, Listening]:
    parts = search_step(search_run(tmp_path, tmp_path / "run", **changes)).parts
    searcher = Listening()
    return SearchStep(replace(parts, searcher=searcher)), searcher


def test_candidates_meet_the_same_queries_and_draws(tmp_path: Path) -> None:
    changes = {
        "training": {"queries_per_step": 3},
        "search": {"completions_per_query": 2},
    }
    step, searcher = listening_step(tmp_path, **changes)
    step.step(0, 11)
    step.step(1, 12)
    for first, second, third in searcher.told:
        queries = [group.query for group in first.groups]
        assert len(queries) == 3
        assert [g.query for g in second.groups] == [g.query for g in third.groups] == queries
        assert first.rewards.shape == (3, 2)
        # The same text under another number: equal to the last token.
        assert [g.completions for g in first.groups] == [g.completions for g in third.groups]
        assert torch.equal(first.rewards, third.rewards)
        assert [g.completions for g in first.groups] != [g.completions for g in second.groups]
    one, two = (told[0].groups for told in searcher.told)
    assert {group.query.index for group in one}.isdisjoint({group.query.index for group in two})


def test_a_trial_holds_its_own_completions_and_scores(tmp_path: Path) -> None:
    """Against the reward written out, and the engine asked anew for one candidate."""
    step, searcher = listening_step(tmp_path, training={"queries_per_step": 2})
    result = step.step(0, 11)
    trials = searcher.told[0]
    for trial in trials:
        texts = [c.text for group in trial.groups for c in group.completions]
        shares = [sum(t.count(v) for v in "aeiou") / max(1, len(t)) for t in texts]
        assert trial.rewards.flatten().tolist() == pytest.approx(shares)
        assert torch.equal(trial.values["letters"], trial.rewards)
        engine = step.parts.engine
        engine.sync(trial.candidate.prompt)
        queries = [group.query for group in trial.groups]
        assert engine.generate(queries, 1, step.parts.sampling, 11).groups == trial.groups
    assert [row["candidate"] for row in result.rows] == [0, 0, 1, 1, 2, 2]
    assert [row["completion"] for row in result.rows] == [
        c.text for trial in trials for group in trial.groups for c in group.completions
    ]
    best = searcher.incumbent.id
    learned = {row["candidate"] for row in result.rows if row["who"] == "learned"}
    assert learned == {best} and step.prompt is searcher.incumbent.prompt
    assert result.metrics["search/incumbent"] == best
    assert result.metrics["search/best_reward"] == max(trial.reward for trial in trials)
    assert result.metrics["search/candidates"] == 3
    assert result.metrics["search/calls"] == 6
    assert result.metrics["reward"] == pytest.approx(
        torch.cat([trial.rewards.flatten() for trial in trials]).mean().item()
    )
    assert result.num_tokens == sum(int(trial.lengths.sum()) for trial in trials)
    assert result.phases.keys() == {"rollout", "reward", "search"}
    assert [row["completions"] for row in step.tried] == [2, 2, 2]


def test_what_rewards_note_reaches_the_searcher(tmp_path: Path) -> None:
    source = """
def reward(completions, log_extra, **kwargs):
    log_extra("feedback", [f"{text} is too long" for text in completions])
    return [None if place % 2 else 1.0 for place in range(len(completions))]
"""
    (tmp_path / "noting.py").write_text(source)
    rewards = [{"path": "noting.py:reward", "name": "noting"}]
    step, searcher = listening_step(tmp_path, rewards=rewards, training={"queries_per_step": 2})
    step.step(0, 11)
    for trial in searcher.told[0]:
        texts = [c.text for group in trial.groups for c in group.completions]
        assert trial.notes["feedback"] == [f"{text} is too long" for text in texts]
        assert trial.rewards.isnan().tolist() == [[False], [True]]
    assert [row["scored"] for row in step.tried] == [1, 1, 1]


def test_without_any_score_there_is_no_best_reward(tmp_path: Path) -> None:
    rewards = [{"path": "rewards.py:nothing", "name": "nothing"}]
    step, _ = listening_step(tmp_path, rewards=rewards)
    metrics = step.step(0, 11).metrics
    assert "search/best_reward" not in metrics and "reward" not in metrics
    assert metrics["search/calls"] == 3


class Silent(Listening):
    def ask(self) -> Sequence[Candidate]:
        return []


class Doubling(Listening):
    def ask(self) -> Sequence[Candidate]:
        return [Candidate(0, TextPrompt("a")), Candidate(0, TextPrompt("b"))]


@pytest.mark.parametrize(
    ("searcher", "sentence"),
    [(Silent, "Silent asked for no candidate"), (Doubling, "Doubling asked for two candidates of")],
)
def test_a_searcher_that_breaks_its_contract_is_named(
    tmp_path: Path, searcher: type[Listening], sentence: str
) -> None:
    parts = search_step(search_run(tmp_path, tmp_path / "run")).parts
    with pytest.raises(InputError, match=sentence):
        SearchStep(replace(parts, searcher=searcher())).step(0, 11)


class OnlySoft(NativeEngine):
    def supports(self, prompt: Prompt) -> bool:
        return prompt.kind == "soft"


def test_an_engine_that_cannot_apply_the_start_is_refused(tmp_path: Path) -> None:
    parts = search_step(search_run(tmp_path, tmp_path / "run")).parts
    with pytest.raises(InputError, match="cannot apply a text prompt"):
        SearchStep(replace(parts, engine=OnlySoft(tiny_policy())))


def test_the_state_of_another_learner_is_refused(tmp_path: Path) -> None:
    gradients = gradient_step(tiny_trainer(tmp_path, tmp_path / "a")).state()
    with pytest.raises(ValueError, match="learned by gradients"):
        search_step(search_run(tmp_path, tmp_path / "b")).restore(gradients)


def test_prompts_of_several_kinds_are_kept_as_they_are(tmp_path: Path) -> None:
    step = search_step(wandering_run(tmp_path, tmp_path / "run"))
    seen: dict[str, tuple[Prompt, LearnerState]] = {}
    for number in range(20):
        seen[step.prompt.kind] = step.prompt, step.prompt_state()
        if seen.keys() == {"text", "soft"}:
            break
        step.step(number, number)
    text, kept_text = seen["text"]
    soft, kept_soft = seen["soft"]
    assert step.restored_prompt(kept_text).init_text == text.init_text
    again = step.restored_prompt(kept_soft)
    assert isinstance(soft, SoftPrompt) and isinstance(again, SoftPrompt)
    assert again is not soft and torch.equal(again.embeddings, soft.embeddings)


def limited_step(tmp_path: Path, calls: int, **changes: Any) -> tuple[SearchStep, Listening]:
    """Three texts on four queries a step, two completions of each: 24 calls a step."""
    changes = {
        "training": {"queries_per_step": 4},
        "search": {"completions_per_query": 2},
        **changes,
    }
    parts = search_step(search_run(tmp_path, tmp_path / "run", **changes)).parts
    searcher = Listening()
    return SearchStep(replace(parts, searcher=searcher, max_calls=calls)), searcher


@pytest.mark.parametrize(
    ("calls", "queries"),
    [(6, [1]), (11, [1]), (23, [3]), (24, [4]), (30, [4, 1]), (47, [4, 3]), (48, [4, 4])],
)
def test_a_search_never_makes_more_calls_than_it_may(
    tmp_path: Path, calls: int, queries: list[int]
) -> None:
    """It uses them up, too: what is left would not give every candidate one query."""
    step, searcher = limited_step(tmp_path, calls)
    made = 0
    while not step.is_over:
        made = int(step.step(len(searcher.told), len(searcher.told)).metrics["search/calls"])
    assert [len(told[0].groups) for told in searcher.told] == queries
    assert calls - 6 < made == 6 * sum(queries) <= calls
    for told in searcher.told:
        assert len({tuple(group.query.index for group in each.groups) for each in told}) == 1
        assert {each.rewards.shape[1] for each in told} == {2}


def test_fewer_calls_than_one_query_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_calls is 5, but one query takes 6 completions"):
        limited_step(tmp_path, 5)


class Growing(Listening):
    """Asks for one text, and for three from then on, without saying so."""

    @property
    def num_next(self) -> int:
        return 1

    def ask(self) -> Sequence[Candidate]:
        asked = super().ask()
        return asked[:1] if not self.told else asked


def test_what_is_not_paid_for_is_not_tried(tmp_path: Path) -> None:
    """Whoever does not say how many are next is asked; the search is then where it was."""
    step, _ = limited_step(tmp_path, 12)
    searcher = Growing()
    step = SearchStep(replace(step.parts, searcher=searcher))
    step.step(0, 0)
    before = searcher.state()
    assert not step.is_over
    result = step.step(1, 1)
    assert step.is_over and len(searcher.told) == 1
    assert (result.rows, result.num_tokens, result.metrics["search/calls"]) == ([], 0, 8.0)
    assert result.metrics["search/candidates"] == 0
    assert searcher.state().plain == before.plain
    state = step.state()
    for calls, is_over in ((12, True), (40, False)):  # given more, it goes on
        again = SearchStep(replace(step.parts, searcher=Growing(), max_calls=calls))
        again.restore(state)
        assert again.is_over == is_over


class Hungry(Growing):
    def ask(self) -> Sequence[Candidate]:
        return Listening.ask(self)


def test_a_first_step_that_is_not_paid_for_is_an_error(tmp_path: Path) -> None:
    step, _ = limited_step(tmp_path, 12)
    step = SearchStep(replace(step.parts, searcher=Hungry(), max_calls=4))
    with pytest.raises(InputError, match=r"max_calls is 4, but one query takes 6 .*raise it"):
        step.step(0, 0)
