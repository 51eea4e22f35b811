"""GEPA: a language model reads completions and feedback, and writes the next system text.

The package `gepa` (Agrawal et al., 2025, arXiv 2507.19457; extra `rlprompt[gepa]`) decides what is
tried: which accepted text is changed next (from the Pareto front over the queries that texts are
ranked on), on which minibatch, and what becomes of the proposal. Completions, rewards, budget and
checkpoints are ours, as for every search.

Training queries are parted: from some, proposals are written; on others, accepted texts are ranked;
with `acceptance: fresh`, on others still it is tested whether a proposal is better than its parent
at all. GEPA's own gate, `acceptance: minibatch`, accepts a proposal whose sum is higher on the
minibatch that it was written from: of proposals that change nothing, about a third.

One step of a run is one question of GEPA's: one text on a minibatch or on all ranking queries, or
parent and proposal on fresh ones. `completions_per_query` completions of a query count as their
mean.
"""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from rlprompt.certify.acceptance import Acceptance
from rlprompt.errors import InputError
from rlprompt.prompts.text import TextPrompt
from rlprompt.runs.learner import LearnerState
from rlprompt.search.base import Candidate, Searcher, SearchSettings, SearchStart, Trial
from rlprompt.search.evidence import EvidenceSettings
from rlprompt.search.gepa_loop import Example, Memory, Plan, load_gepa, stand
from rlprompt.search.gepa_reflection import Given, Proposer, Reflecting, examples_of
from rlprompt.search.make_writer import AnyWriterSettings, make_writer
from rlprompt.search.writer import BaseWriterSettings, WriterSettings
from rlprompt.types import Query

_MOST_RANKING = 24
_PLACEHOLDERS = ("<curr_param>", "<side_info>")


class GEPASettings(SearchSettings):
    """A language model reads completions with feedback and writes the next text (GEPA)."""

    type: Literal["gepa"] = "gepa"
    """Searcher."""
    writer: AnyWriterSettings | None = None
    """Who reflects and writes proposals; null = the base, unless `proposals` are given."""
    template: str | None = None
    """What the writer is asked, with `<curr_param>` where the present text stands and `<side_info>`
    where completions and feedback stand; null = GEPA's own."""
    proposals: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Texts written beforehand, which take the place of the writer's in this order; the search is
    over when they are used up."""
    ranking_queries: int | None = Field(default=None, ge=1)
    """Training queries that are set apart to rank accepted texts on; null = a fifth of them, 24 at
    most. Each accepted text is tried on all of them."""
    acceptance: Literal["minibatch", "fresh"] = "minibatch"
    """What lets a proposal in: `minibatch` = a higher sum on the minibatch that it was written from
    (GEPA's own gate); `fresh` = being shown better than its parent on queries set apart for it,
    half of those that are not for ranking."""
    evidence: EvidenceSettings | None = None
    """With `acceptance: fresh`: when a proposal counts as better; null = its defaults."""
    select: Literal["pareto", "current_best", "epsilon_greedy", "top_k_pareto"] = "pareto"
    """Which accepted text is changed next (GEPA's `candidate_selection_strategy`)."""
    perfect_reward: float | None = None
    """A text that gets this on every query of a minibatch is not changed there; null = any reward
    can be bettered."""

    @model_validator(mode="after")
    def _settings_have_effect(self) -> Self:
        for name in ("writer", "template"):
            if self.proposals is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} has no effect where proposals are given; remove one of them"
                )
        if self.evidence is not None and self.acceptance != "fresh":
            raise ValueError(
                "evidence has no effect with acceptance: minibatch; set acceptance: fresh, or "
                "remove evidence"
            )
        return self

    @field_validator("template")
    @classmethod
    def _has_places(cls, template: str | None) -> str | None:
        missing = [each for each in _PLACEHOLDERS if template is not None and each not in template]
        if missing:
            raise ValueError(f"template has no {' and no '.join(missing)}; write it where it goes")
        return template

    @field_validator("proposals")
    @classmethod
    def _differ(cls, texts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        kept = tuple(text.strip() for text in texts or ())
        for place, text in enumerate(kept):
            if not text:
                raise ValueError(f"proposal {place} is blank; write a system message")
            if text in kept[:place]:
                raise ValueError(f"proposal {place} is there twice; remove one")
        return kept or None


class GEPA(Searcher):
    """Runs GEPA by ask and tell; see the module."""

    Settings: ClassVar[type[SearchSettings]] = GEPASettings
    starts_from: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(self, plan: Plan, queries: Sequence[Query], proposer: Proposer) -> None:
        """Nothing is tried yet.

        Args:
            plan: plan of the search.
            queries: training queries that the plan's places are of.
            proposer: what gives new texts.

        Raises:
            InputError: see `gepa_loop.stand`.
        """
        self._plan = plan
        self._queries = queries
        self._proposer = proposer
        self._memory = Memory()
        self._met: NDArray[np.float64] | None = None
        """[C, q] rewards of the question's first q queries; None = of none."""
        self._examples: list[Example] = []
        """Of the question's first text on those queries."""
        self._standing = stand(plan, self._memory, proposer)

    @classmethod
    def make(cls, settings: GEPASettings, given: SearchStart) -> Self:
        """The searcher of a recipe; see `Searcher.make`."""
        load_gepa()
        plan = plan_of(settings, given)
        if settings.proposals is not None:
            return cls(plan, given.queries, Given(settings.proposals))
        chosen: WriterSettings = settings.writer or BaseWriterSettings()
        writer = make_writer(chosen, given)
        reflecting = Reflecting(writer, chosen, settings.template, given.seed, given.engine)
        return cls(plan, given.queries, reflecting)

    def ask(self) -> Sequence[Candidate]:
        """The texts of GEPA's question."""
        question = self._standing.question
        assert question is not None  # else `is_over`
        return [self._candidate(text) for text in question.texts]

    @property
    def wanted_queries(self) -> Sequence[Query]:
        """The queries of GEPA's question that were not met yet."""
        question = self._standing.question
        assert question is not None
        return [self._queries[place] for place in question.places[self._num_met :]]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Answer GEPA's question, once all of its queries were met."""
        question = self._standing.question
        assert question is not None
        rewards = np.stack([trial.query_rewards.numpy() for trial in trials])
        if self._met is not None:
            rewards = np.concatenate([self._met, rewards], axis=1)
        self._met = rewards
        self._examples += examples_of(trials[0])
        if self._num_met == len(question.places):
            self._memory.answers.append(rewards)
            self._memory.examples = self._examples
            self._met, self._examples = None, []
            self._standing = stand(self._plan, self._memory, self._proposer)

    @property
    def _num_met(self) -> int:
        return 0 if self._met is None else self._met.shape[1]

    @property
    def incumbent(self) -> Candidate:
        """The accepted text with the highest mean on the ranking queries."""
        return self._candidate(self._standing.best)

    @property
    def is_over(self) -> bool:
        """Whether the texts written beforehand are used up."""
        return self._standing.question is None

    @property
    def num_next(self) -> int:
        """Texts of GEPA's question."""
        question = self._standing.question
        return 1 if question is None else len(question.texts)

    def _candidate(self, text: str) -> Candidate:
        if text == self._plan.start:
            return Candidate(0, TextPrompt(text), origin="start")
        ids = {known: place + 1 for place, known in enumerate(self._standing.parents)}
        parent = ids.get(self._standing.parents[text], 0)
        return Candidate(ids[text], TextPrompt(text), (parent,), self._proposer.origin)

    def state(self) -> LearnerState:
        """All answers and proposals; GEPA's own state follows from them."""
        answers = self._memory.answers
        met = np.empty((0, 0)) if self._met is None else self._met
        tensors = {
            "answers": torch.tensor([each for answer in answers for each in answer.flat]).double(),
            "met": torch.from_numpy(met.copy()),
        }
        plain = {
            "gepa": importlib.metadata.version("gepa"),
            "plan": _as_json(self._plan),
            "sizes": [list(answer.shape) for answer in answers],
            "proposals": list(self._memory.proposals),
            "examples": [dict(example) for example in self._examples],
        }
        return LearnerState(tensors, plain)

    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken; see `Searcher.restore`."""
        plain, version = state.plain, importlib.metadata.version("gepa")
        if plain["plan"] != _as_json(self._plan):
            raise ValueError("it searched with other settings, another start or other queries")
        if plain["gepa"] != version:
            raise ValueError(f"it ran with gepa {plain['gepa']}, and {version} is installed")
        memory, used = Memory(proposals=list(plain["proposals"])), 0
        flat = state.tensors["answers"].numpy()
        for texts, count in plain["sizes"]:
            memory.answers.append(flat[used : used + texts * count].reshape(texts, count).copy())
            used += texts * count
        met = state.tensors["met"].numpy()
        self._standing = stand(self._plan, memory, self._proposer)
        self._memory = memory
        self._met = met.copy() if met.size else None
        self._examples = list(plain["examples"])


def plan_of(settings: GEPASettings, given: SearchStart) -> Plan:
    """Which training queries serve for what.

    Raises:
        InputError: there are too few.
    """
    places = list(range(len(given.queries)))
    random.Random(given.seed).shuffle(places)
    ranking = settings.ranking_queries or max(1, min(_MOST_RANKING, len(places) // 5))
    left = len(places) - ranking
    fresh = left // 2 if settings.acceptance == "fresh" else 0
    fewest = 1 if settings.acceptance == "minibatch" else 2
    if left < fewest:
        raise InputError(
            f"search.type gepa ranks texts on {ranking} training queries and needs at least "
            f"{fewest} others, but there are {len(places)} in all; add queries or lower "
            "search.ranking_queries"
        )
    acceptance = None
    if settings.acceptance == "fresh":
        chosen = settings.evidence or EvidenceSettings()
        acceptance = Acceptance(
            chosen.alpha,
            reuse=True,  # GEPA learns nothing of a test but whether the proposal was accepted
            spread=chosen.spread,
            min_effect=chosen.min_effect,
            miss_rate=chosen.miss_rate,
        )
    return Plan(
        start=given.prompt.init_text.strip(),
        reflection=tuple(places[ranking + fresh :]),
        ranking=tuple(places[:ranking]),
        fresh=tuple(places[ranking : ranking + fresh]),
        minibatch=given.queries_per_step,
        select=settings.select,
        perfect=settings.perfect_reward,
        seed=given.seed,
        acceptance=acceptance,
        num_proposals=len(settings.proposals) if settings.proposals else None,
    )


def _as_json(plan: Plan) -> dict[str, Any]:
    """A plan as it comes back from a file."""
    values = asdict(plan).items()
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values}
