"""A text found token by token, with the gradient of the base: a white-box search.

In the line of HotFlip, AutoPrompt and GCG, but for rewards: what is differentiated by the tokens of
the prompt is the advantage-weighted log-likelihood of completions that candidates drew
(`search.substitution`), or the likelihood of answers that the dataset gives. Substitutions that are
good to first order are screened by forwards of the base on the same completions
(`search.proposals`); the few best are tried in the next step, and their rewards decide.

    tell    rewards of the candidates -> incumbent; completions -> gradient -> the next candidates
    ask     the incumbent, those not decided about, and the next candidates

Forwards of the base are no calls of the reward: `search/forwards` and `search/backwards` count
them. Every candidate is a text of which the tokenizer makes the tokens that were meant.

Letters: C candidates, Q queries, n completions per query, B completions, m slot tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator

from rlprompt.certify.acceptance import Acceptance
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.rollout.sources import given_completion
from rlprompt.runs.learner import LearnerState
from rlprompt.search.base import Candidate, Searcher, SearchSettings, SearchStart, Trial
from rlprompt.search.evidence import EvidenceSettings
from rlprompt.search.projection import Metric, project
from rlprompt.search.proposals import ProposalRules, Proposer
from rlprompt.search.standings import Contender, best_by_margin, ranked
from rlprompt.search.substitution import pooled_advantages
from rlprompt.search.surrogate import Evidence, Forwards
from rlprompt.search.vocabulary import Vocabulary
from rlprompt.types import Completion, Group, Query

logger = logging.getLogger(__name__)

CLIP = 0.5
MARGIN = 1.0
SURVIVORS = 1


class TokensSettings(SearchSettings):
    """A text found token by token, with the gradient of the base."""

    type: Literal["tokens"] = "tokens"
    """Searcher."""
    candidates: int = Field(default=4, ge=1, le=1024)
    """New texts that each step tries beside the incumbent."""
    top_k: int = Field(default=64, ge=1)
    """Tokens of each place that substitutions are drawn from: those of highest gradient."""
    substitutions: int = Field(default=32, ge=1, le=65536)
    """Texts per round that are compared by forwards of the base; the best `candidates` of all
    rounds are tried. Costs no calls of the reward."""
    rounds: int = Field(default=2, ge=1, le=64)
    """Gradients per step, each at the best text of the one before: how many tokens a candidate may
    be away from the incumbent."""
    screen_completions: int = Field(default=16, ge=1, le=65536)
    """Completions, at most, that texts are compared by: those whose advantage says most."""
    clip: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Share by which a completion that was worse than others may become less likely, per token,
    before a text gains nothing more by it; 0.5 where null."""
    fluency_weight: float = Field(default=0.1, ge=0.0)
    """What a nat per token of the text's own log-probability under the base counts for, where one
    standard deviation of the reward counts 1; 0 = fluency does not count."""
    ascii_only: bool = True
    """Whether tokens that are put in have ASCII characters only. Those of the start may stay."""
    grow: int = Field(default=0, ge=0, le=4096)
    """Tokens by which the text may become longer than the start, by insertions; 0 = never."""
    shrink: int = Field(default=0, ge=0, le=4096)
    """Tokens by which the text may become shorter than the start, by deletions; 0 = never."""
    target_column: str | None = Field(default=None, min_length=1)
    """Column of the dataset with answers whose likelihood is differentiated in the place of the
    rewards of drawn completions; rewards decide all the same."""
    survivors: int | None = Field(default=None, ge=0, le=1024)
    """Candidates that the next step tries again: the best beside the incumbent, by all steps that
    both were tried in; 1 where null."""
    margin: float | None = Field(default=None, ge=0.0)
    """Standard errors of the paired difference by which a candidate must be better than the
    incumbent to replace it; 1 where null."""
    evidence: EvidenceSettings | None = None
    """Replace the incumbent only by what is shown to be better, at an error rate over the whole
    search, which is over when all training queries were met; null = by `margin`."""
    projection: Metric | None = None
    """Distance by which a soft prompt's vectors become tokens, cosine where null; for a search that
    starts from a soft prompt."""

    @model_validator(mode="after")
    def _have_effect(self) -> Self:
        for name in ("survivors", "margin"):
            if self.evidence is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is for a search without evidence and has no effect beside it; remove "
                    "one of them"
                )
        if self.target_column is not None and self.clip is not None:
            raise ValueError(
                "clip is for drawn completions and has no effect on the answers of target_column; "
                "remove one of them"
            )
        return self


class _Start(NamedTuple):
    """The text that a search begins with."""

    text: str
    token_ids: tuple[int, ...]


class Tokens(Searcher):
    """Gradient-guided search among the tokens of a text; see the module."""

    Settings: ClassVar[type[SearchSettings]] = TokensSettings
    starts_from: ClassVar[tuple[str, ...]] = ("text", "soft")

    def __init__(
        self,
        settings: TokensSettings,
        start: _Start,
        proposer: Proposer,
        forwards: Forwards,
        targets: Mapping[int, Group],
        seed: int,
    ) -> None:
        """Nothing is tried yet.

        Args:
            settings: the settings.
            start: the text to begin with.
            proposer: what makes candidates.
            forwards: the forwards that it makes, which are counted.
            targets: given answers by the query's index; empty = drawn completions are learned from.
            seed: seed of what is drawn.
        """
        self._settings = settings
        self._proposer = proposer
        self._forwards = forwards
        self._targets = targets
        self._seed = seed
        first = Candidate(0, TextPrompt(start.text), origin="start")
        self._incumbent = Contender(first, start.token_ids)
        self._others: list[Contender] = []
        self._known = [start.text]
        self._step = 0
        self._has_asked = False
        self._acceptance: Acceptance | None = None
        if settings.evidence is not None:
            chosen = settings.evidence
            self._acceptance = Acceptance(
                chosen.alpha,
                spread=chosen.spread,
                min_effect=chosen.min_effect,
                miss_rate=chosen.miss_rate,
            )
        self._met: set[int] = set()
        self._is_stale = False

    @classmethod
    def make(cls, settings: TokensSettings, given: SearchStart) -> Self:
        """The searcher of a recipe; see `Searcher.make`."""
        policy = _policy(given)
        vocabulary = Vocabulary(policy, ascii_only=settings.ascii_only)
        start = _start(given.prompt, policy, vocabulary, settings.projection)
        length = len(start.token_ids)
        if settings.shrink >= length:
            raise InputError(
                f"search.shrink is {settings.shrink}, and the text to start from has {length} "
                f"tokens, so nothing would be left of it; set it to {length - 1} at most"
            )
        forwards = Forwards(policy, given.temperature or 1.0)
        rules = ProposalRules(
            candidates=settings.candidates,
            top_k=settings.top_k,
            substitutions=max(settings.substitutions, settings.candidates),
            rounds=settings.rounds,
            screen_completions=settings.screen_completions,
            clip=settings.clip or CLIP,
            fluency_weight=settings.fluency_weight,
            min_tokens=length - settings.shrink,
            max_tokens=length + settings.grow,
        )
        proposer = Proposer(forwards, vocabulary, rules)
        targets = _targets(settings.target_column, given.queries, policy)
        return cls(settings, start, proposer, forwards, targets, given.seed)

    def ask(self) -> Sequence[Candidate]:
        """The incumbent, and who would replace it."""
        if not self._has_asked:
            self._has_asked = True
            self._add_proposals(None)
        return [self._incumbent.candidate, *(each.candidate for each in self._others)]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Compare rewards, and make the next candidates of what they say."""
        queries = [group.query.index for group in trials[0].groups]
        for contender, trial in zip([self._incumbent, *self._others], trials, strict=True):
            contender.rewards[self._step] = trial.query_rewards.tolist()
        if self._acceptance is None:
            self._choose_by_margin()
        else:
            self._choose_by_evidence(queries, self._acceptance)
        self._step += 1
        targets = [self._targets[index] for index in queries if self._targets]
        self._add_proposals(given_answers(targets) if targets else drawn_completions(trials))

    def _choose_by_margin(self) -> None:
        settings = self._settings
        margin = MARGIN if settings.margin is None else settings.margin
        better = best_by_margin(self._incumbent, self._others, margin)
        if better is not None:
            self._others = [each for each in self._others if each is not better]
            self._others.append(self._incumbent)
            self._incumbent = better
        count = SURVIVORS if settings.survivors is None else settings.survivors
        self._others = ranked(self._incumbent, self._others)[:count]

    def _choose_by_evidence(self, queries: Sequence[int], acceptance: Acceptance) -> None:
        """Take up a step's differences on queries that no candidate was made from."""
        fresh = [i for i, name in enumerate(queries) if name not in self._met]
        fresh = [i for i in fresh if queries.index(queries[i]) == i]
        self._is_stale = not fresh
        self._met.update(queries)
        ours = self._incumbent.rewards[self._step]
        for each in self._others:
            assert each.test is not None
            row = each.rewards[self._step]
            try:
                each.test.update([row[i] - ours[i] for i in fresh], [queries[i] for i in fresh])
            except ValueError as error:
                raise InputError(f"search.evidence.spread does not hold: {error}") from error
        accepted = []
        for each in self._others:
            assert each.test is not None
            if each.test.decision != "more" and acceptance.close(each.test):
                accepted.append(each)
        if accepted:
            # The tests of the others were against the one that is replaced.
            self._incumbent = max(accepted, key=lambda c: c.test.mean if c.test else 0.0)
            self._others = []
        self._others = [c for c in self._others if c.test and c.test.decision == "more"]

    def _add_proposals(self, evidence: Evidence | None) -> None:
        """Put new texts beside those that are tried again."""
        if self._targets and evidence is None:
            first = list(self._targets.values())[: self._settings.screen_completions]
            evidence = given_answers(first)
        stand = self._incumbent
        seed = f"{self._seed}/{self._step}"
        made = self._proposer.propose(stand.token_ids, evidence, self._known, seed)
        if self._acceptance is not None:
            made = made[: max(0, self._settings.candidates - len(self._others))]
        for each in made:
            new = Candidate(
                len(self._known), TextPrompt(each.text), (stand.candidate.id,), each.origin
            )
            test = None if self._acceptance is None else self._acceptance.begin()
            self._others.append(Contender(new, each.token_ids, test=test))
            self._known.append(each.text)

    @property
    def incumbent(self) -> Candidate:
        """The text that replaced another last; at first the start."""
        return self._incumbent.candidate

    @property
    def is_over(self) -> bool:
        """Whether no text is left to be tried, or evidence asks for queries that were all met."""
        return self._is_stale or (self._has_asked and not self._others)

    @property
    def metrics(self) -> Mapping[str, float]:
        """What the base was asked beside the calls, and the length of the text, in tokens."""
        return {
            "forwards": float(self._forwards.forwards),
            "backwards": float(self._forwards.backwards),
            "prompt_tokens": float(len(self._incumbent.token_ids)),
        }

    def state(self) -> LearnerState:
        """Who is tried, what came of them so far, and all texts that were tried."""
        plain: dict[str, Any] = {
            "incumbent": self._incumbent.state(),
            "others": [each.state() for each in self._others],
            "known": list(self._known),
            "step": self._step,
            "has_asked": self._has_asked,
            "forwards": self._forwards.forwards,
            "backwards": self._forwards.backwards,
            "met": sorted(self._met),
            "is_stale": self._is_stale,
        }
        if self._acceptance is not None:
            plain["acceptance"] = self._acceptance.state_dict()
        return LearnerState({}, plain)

    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken; see `Searcher.restore`."""
        plain = state.plain
        if plain["known"][0] != self._known[0]:
            raise ValueError("it started from another text")
        if (self._acceptance is None) != ("acceptance" not in plain):
            raise ValueError("it chose by another rule")
        if self._acceptance is not None:
            self._acceptance = Acceptance.from_state(plain["acceptance"])
        self._incumbent = Contender.from_state(plain["incumbent"])
        self._others = [Contender.from_state(each) for each in plain["others"]]
        self._known = list(plain["known"])
        self._step = int(plain["step"])
        self._has_asked = bool(plain["has_asked"])
        self._forwards.forwards = int(plain["forwards"])
        self._forwards.backwards = int(plain["backwards"])
        self._met = {int(index) for index in plain["met"]}
        self._is_stale = bool(plain["is_stale"])


def drawn_completions(trials: Sequence[Trial]) -> Evidence | None:
    """A step's completions under all candidates, with what they count for.

    Equal completions of a query are one, with the sum of their advantages; those that count for
    nothing are left out.

    Args:
        trials: the trials of a step.

    Returns:
        None where no query's rewards differ.
    """
    advantages = pooled_advantages(torch.stack([trial.rewards for trial in trials]))
    groups: list[Group] = []
    weights: list[float] = []
    sampling: list[float] = []
    for place, group in enumerate(trials[0].groups):
        sums: dict[tuple[int, ...], float] = {}
        first: dict[tuple[int, ...], Completion] = {}
        for trial, own in zip(trials, advantages[:, place].tolist(), strict=True):
            for completion, weight in zip(trial.groups[place].completions, own, strict=True):
                sums[completion.token_ids] = sums.get(completion.token_ids, 0.0) + weight
                first.setdefault(completion.token_ids, completion)
        kept = [ids for ids, weight in sums.items() if abs(weight) > 1e-9]
        if kept:
            groups.append(Group(group.query, tuple(first[ids] for ids in kept)))
            weights += [sums[ids] for ids in kept]
            sampling += [_mean_logprob(first[ids]) for ids in kept]
    if not groups:
        return None
    # The mean over those that are kept is then that over all that were drawn.
    wide = torch.tensor(weights, dtype=torch.float64) * len(weights) / advantages.numel()
    return Evidence(tuple(groups), wide, torch.tensor(sampling, dtype=torch.float64))


def given_answers(groups: Sequence[Group]) -> Evidence:
    """Answers of a dataset, which count alike.

    Args:
        groups: the queries, each with its answers.
    """
    count = sum(len(group.completions) for group in groups)
    ones = torch.ones(count, dtype=torch.float64)
    return Evidence(tuple(groups), ones, torch.full_like(ones, torch.nan))


def _mean_logprob(completion: Completion) -> float:
    known = completion.sampling_logprobs
    return sum(known) / len(known) if known else float("nan")


def _policy(given: SearchStart) -> Policy:
    """The base that is looked into.

    Raises:
        InputError: there is none, or this rank holds only a part of it.
    """
    policy = given.policy
    if not isinstance(policy, Policy):
        raise InputError(
            "search.type: tokens needs the weights of the base, of which it takes the gradient, "
            "and the engine has none; choose a search that needs outputs only, such as texts"
        )
    if policy.base.shards is not None:
        raise InputError(
            "search.type: tokens needs the whole base on each rank, distributed.base is sharded; "
            "remove it"
        )
    return policy


def _start(prompt: Prompt, policy: Policy, vocabulary: Vocabulary, metric: Metric | None) -> _Start:
    """The text to begin with.

    Raises:
        InputError: the text is no fixed point, the soft prompt no text, or a metric has no effect.
    """
    if isinstance(prompt, SoftPrompt):
        found = project(prompt, policy, vocabulary, metric or "cosine")
        logger.info(
            "the search starts from the text nearest to the soft prompt, %r, at a mean distance of "
            "%.3g (%s)%s",
            found.text,
            found.gap,
            metric or "cosine",
            "" if found.is_exact else "; its tokens are not all the nearest ones",
        )
        return _Start(found.text, found.token_ids)
    if metric is not None:
        raise InputError(
            "search.projection is for a search that starts from a soft prompt, prompt.type is "
            f"{prompt.kind}; remove it"
        )
    return _Start(prompt.init_text, tuple(vocabulary.ids_of(prompt.init_text)))


def _targets(column: str | None, queries: Sequence[Query], policy: Policy) -> dict[int, Group]:
    """The answers of a column by the index of their query.

    Raises:
        InputError: a query has none.
    """
    if column is None:
        return {}
    missing = next((query for query in queries if column not in query.columns), None)
    if missing is not None or not queries:
        where = "the data" if missing is None else missing.place or f"query {missing.index}"
        raise InputError(
            f"search.target_column is '{column}', which {where} does not have; name the column "
            "that holds the answers, or remove it to learn from rewards"
        )
    return {
        query.index: Group(query, (given_completion(policy, query, column),)) for query in queries
    }
