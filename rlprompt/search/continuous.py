"""Evolution strategies over the numbers of a soft or prefix prompt, by outputs and scores alone.

    strategy.sample        points of a subspace around the start
      -> subspace          a prompt for each point
      -> trials            the prompt of the mean, and that of each point, on the same queries
      -> fitness           places of the points
    strategy.update        the next mean and deviations

**Which prompt is believed best.** Not the best trial: of many candidates that were tried on a few
queries the one with the highest mean reward is, above all, the luckiest. The mean of the
distribution is an average over candidates, so that luck cancels (Beyer, "Evolutionary algorithms in
noisy environments", 2000, section 3.2). It is tried in each step beside the candidates, so what is
believed best has met queries, and its reward stands in the lineage. It is the latest mean that was
tried; with `evidence` a mean replaces the incumbent only when it is shown to be better, on queries
that it was not made from.

**Noise.** With `noise`, a generation whose rewards are mostly noise is tried again, on new queries,
before the strategy learns from it: the share of noise is taken from the rewards themselves, query
by query (`rlprompt.search.ranking.reliability`). Candidates that are asked for again keep their id.

Letters: C candidates, Q queries, d dimensions.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.runs.learner import LearnerState, named_under
from rlprompt.search.base import Candidate, Searcher, SearchSettings, SearchStart, Trial
from rlprompt.search.evidence import Duel, EvidenceSettings
from rlprompt.search.ranking import candidate_scores, places, reliability
from rlprompt.search.strategy import Strategy
from rlprompt.search.subspace import (
    Subspace,
    embedding_directions,
    flat_parameters,
    random_directions,
)
from rlprompt.settings import Settings


class NoiseSettings(Settings):
    """When a generation is tried again on new queries."""

    reliability: float = Field(default=0.5, gt=0.0, lt=1.0)
    """A generation is tried again while less than this share of the variance of its candidates'
    mean rewards is more than noise."""
    max_steps: int = Field(default=4, ge=2, le=64)
    """The most steps in which one generation is tried."""


class ContinuousSettings(SearchSettings):
    """What evolution strategies over the numbers of a prompt share."""

    dim: int = Field(default=32, ge=2, le=1024)
    """d, the dimension of the subspace that is searched. More can reach better prompts, and takes
    more calls."""
    sigma: float = Field(default=0.5, gt=0.0)
    """Standard deviation of the first generation: root mean square by which its prompts' entries
    differ from the start's, in units of what a learning rate is relative to."""
    components: int | None = Field(default=None, ge=1, le=16384)
    """Of a soft prompt: draw the directions among this many principal directions of the
    vocabulary's embeddings, in proportion to how much tokens differ along them; null = all
    directions alike."""
    population: int | None = Field(default=None, ge=4, le=4096)
    """Candidates of a generation, beside its mean; null = 4 + 3 ln(dim), rounded down."""
    noise: NoiseSettings | None = None
    """Try a generation again while its rewards are mostly noise; null = once."""
    evidence: EvidenceSettings | None = None
    """Believe in another prompt only when it is shown to be better; null = in the mean of the last
    generation."""


@dataclass(frozen=True)
class _Mean:
    """The mean of a generation: a point, and the candidate that it is tried as."""

    generation: int
    point: Tensor
    candidate: Candidate


class Continuous(Searcher):
    """A strategy in a subspace around the start; see the module.

    The mean of generation g, from 0, is the candidate g * (C + 1), and its points are those after
    it. So the start is candidate 0.
    """

    Settings: ClassVar[type[SearchSettings]] = ContinuousSettings
    starts_from: ClassVar[tuple[str, ...]] = ("soft", "prefix")

    def __init__(
        self,
        subspace: Subspace,
        strategy: Strategy,
        noise: NoiseSettings | None = None,
        evidence: EvidenceSettings | None = None,
    ) -> None:
        """Nothing is tried yet.

        Args:
            subspace: prompts that the strategy's points stand for.
            strategy: strategy whose mean is 0.
            noise: the rule by which a generation is tried again; None = never.
            evidence: the rule by which another prompt is believed in; None = always the mean that
                was tried last.
        """
        self._subspace = subspace
        self._strategy = strategy
        self._noise = noise
        self._duel = None if evidence is None else Duel(evidence)
        self._mean = self._incumbent = self._mean_of(0, strategy.mean)
        self._challenger: _Mean | None = None
        self._steps = 0
        """Steps in which this generation was tried."""
        self._seen = torch.zeros(strategy.population, 0, dtype=torch.float64)
        """[C, Q] rewards of this generation on the queries of these steps."""
        self._reliability = math.nan
        self._sampled: list[Candidate] = []
        """The candidates of this generation; none until they are asked for."""

    @classmethod
    @abstractmethod
    def make_strategy(cls, settings: Any, seed: int) -> Strategy:
        """The strategy of a recipe, with the mean 0.

        Args:
            settings: an instance of `Settings`.
            seed: seed of its draws.

        Raises:
            InputError: its package is missing.
        """

    @classmethod
    def make(cls, settings: ContinuousSettings, given: SearchStart) -> Self:
        """The searcher of a recipe; see `Searcher.make`."""
        size = len(flat_parameters(given.prompt))
        if settings.dim > size:
            raise InputError(
                f"search.dim is {settings.dim}, but the prompt has only {size} numbers; choose "
                f"{size} or less"
            )
        return cls(
            Subspace(given.prompt, _directions(settings, given, size), given.scale),
            cls.make_strategy(settings, given.seed),
            settings.noise,
            settings.evidence,
        )

    @property
    def population(self) -> int:
        """Candidates of a generation, C, beside its mean."""
        return self._strategy.population

    def ask(self) -> Sequence[Candidate]:
        """The mean, or incumbent and challenger where evidence decides; then the candidates."""
        if not self._sampled:
            points = self._strategy.sample(self._mean.generation)
            first = self._mean.candidate.id
            self._sampled = [
                Candidate(
                    first + place, self._subspace.prompt_at(point), (first,), origin="sampled"
                )
                for place, point in enumerate(points, start=1)
            ]
        return [*(mean.candidate for mean in self._rivals), *self._sampled]

    @property
    def _rivals(self) -> list[_Mean]:
        """The means that are tried beside the candidates."""
        if self._duel is None:
            return [self._mean]
        return (
            [self._incumbent] if self._challenger is None else [self._incumbent, self._challenger]
        )

    def tell(self, trials: Sequence[Trial]) -> None:
        """Weigh the evidence, and learn from the generation once it was tried enough."""
        count = self._strategy.population
        self._believe(trials[:-count])
        told = torch.stack([trial.query_rewards for trial in trials[-count:]])
        self._seen = torch.cat([self._seen, told], dim=1)
        self._steps += 1
        self._reliability = reliability(self._seen)
        if self._is_tried_enough:
            self._learn()

    def _believe(self, rivals: Sequence[Trial]) -> None:
        """Choose the incumbent."""
        if self._duel is None:
            self._incumbent = self._mean
            return
        decision = self._duel.meet(rivals[0], rivals[1] if len(rivals) > 1 else None)
        if decision == "accept" and self._challenger is not None:
            self._incumbent = self._challenger
        if decision != "more":
            self._challenger = None

    @property
    def _is_tried_enough(self) -> bool:
        if self._noise is None or self._steps >= self._noise.max_steps:
            return True
        return self._reliability >= self._noise.reliability  # not where it is unknown, NaN

    def _learn(self) -> None:
        """Update the strategy, and begin the next generation."""
        found = places(candidate_scores(self._seen))
        if len(found.unique()) > 1:  # else nothing says where to go
            self._strategy.update(found)
        self._mean = self._mean_of(self._mean.generation + 1, self._strategy.mean)
        self._sampled, self._steps, self._seen = [], 0, self._seen[:, :0]
        is_new = not torch.equal(self._mean.point, self._incumbent.point)
        if self._duel is not None and self._challenger is None and is_new:
            self._challenger = self._mean
            self._duel.begin()

    def _mean_of(self, generation: int, point: Tensor) -> _Mean:
        size = self._strategy.population + 1
        parents = ((generation - 1) * size,) if generation else ()
        prompt = self._subspace.prompt_at(point)
        origin = "mean" if generation else "start"
        return _Mean(generation, point, Candidate(generation * size, prompt, parents, origin))

    @property
    def incumbent(self) -> Candidate:
        """The mean that was tried last; with evidence, the one that was shown to be best."""
        return self._incumbent.candidate

    @property
    def is_over(self) -> bool:
        """Whether evidence asks for queries where all have been met."""
        return self._duel is not None and self._duel.is_stale

    @property
    def num_next(self) -> int:
        """The candidates of a generation and the means beside them."""
        return len(self._rivals) + self._strategy.population

    @property
    def metrics(self) -> Mapping[str, float]:
        """Generations that were learned from, deviation of the next, reliability of the last."""
        found = {"generation": float(self._mean.generation), "sigma": self._strategy.deviation}
        known = not math.isnan(self._reliability)
        return found | ({"reliability": self._reliability} if known else {})

    def state(self) -> LearnerState:
        """Strategy, this generation's rewards, and the means that are believed in or tested."""
        kept = {"mean": self._mean, "incumbent": self._incumbent}
        if self._challenger is not None:
            kept["challenger"] = self._challenger
        strategy = self._strategy.state()
        tensors = {f"strategy/{name}": tensor for name, tensor in strategy.tensors.items()}
        tensors |= {name: mean.point.clone() for name, mean in kept.items()}
        plain = {
            "strategy": dict(strategy.plain),
            "generations": {name: mean.generation for name, mean in kept.items()},
            "steps": self._steps,
            "duel": None if self._duel is None else self._duel.state(),
        }
        return LearnerState(tensors | {"seen": self._seen.clone()}, plain)

    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken; see `Searcher.restore`."""
        plain, tensors = state.plain, state.tensors
        if (plain["duel"] is None) != (self._duel is None):
            raise ValueError("it decided by another rule")
        if len(tensors["seen"]) != self._strategy.population:
            raise ValueError("its generations were of another size")
        own = LearnerState(named_under(tensors, "strategy"), plain["strategy"])
        self._strategy.restore(own)
        kept = {
            name: self._mean_of(int(generation), tensors[name].clone())
            for name, generation in plain["generations"].items()
        }
        self._mean, self._incumbent = kept["mean"], kept["incumbent"]
        self._challenger = kept.get("challenger")
        if self._duel is not None:
            self._duel.restore(plain["duel"])
        self._steps, self._seen = int(plain["steps"]), tensors["seen"].clone()
        self._sampled, self._reliability = [], math.nan


def _directions(settings: ContinuousSettings, given: SearchStart, size: int) -> Tensor:
    """The directions [d, D] that settings ask for, where the start has D numbers.

    Raises:
        InputError: the start has no embeddings, or there are fewer directions than are asked for.
    """
    if settings.components is None:
        return random_directions(settings.dim, size, given.seed)
    if not isinstance(given.prompt, SoftPrompt):
        raise InputError(
            f"search.components is about embeddings, which a {given.prompt.kind} prompt does not "
            "have; remove it, or set prompt.type: soft"
        )
    if given.engine is None:
        raise InputError(
            "search.components needs the embeddings of the base, and this search has no base; "
            "remove it"
        )
    conditioner = given.engine.policy
    tokens, width = given.prompt.num_virtual_tokens, conditioner.hidden_size
    if settings.components > width or settings.dim > tokens * settings.components:
        raise InputError(
            f"search.components is {settings.components}; choose {width} or less, the width of an "
            f"embedding, and so many that {tokens} tokens times components are at least "
            f"search.dim, {settings.dim}"
        )
    with torch.no_grad():
        table = conditioner.embed(list(range(conditioner.vocab_size))).cpu()
    return embedding_directions(settings.dim, tokens, table, settings.components, given.seed)
