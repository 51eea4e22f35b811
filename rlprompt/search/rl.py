"""Reinforcement learning over text: the base learns to write the system text.

In every step a writer, the base under a soft prompt of its own (`search.trained_writer`), answers
one request with a group of system texts. The target answers the step's fitness queries under each,
and what a text earns there trains the writer by GRPO: what it says more often is what has paid.
The best texts so far are tried again beside the new ones, dropped, promoted and tested as in
`search.evolution`, of which this is a kind: there, new texts come from fixed operators; here, from
a policy that learns. In place of sampling from a large model one trains a small one (Deng et al.,
RLPrompt, EMNLP 2022; Kwon et al., StablePrompt, EMNLP 2024), and the policy is a prompt again.

A text that may not be tried (`search.admission`) earns the least that any text of its group did;
one that was tried before earns what it earned then, and costs nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.runs.learner import LearnerState, named_under
from rlprompt.search import rewriting
from rlprompt.search.admission import Admission, text_key
from rlprompt.search.base import SearchSettings, SearchStart, Trial
from rlprompt.search.breeding import Breeder, Parent, Proposal
from rlprompt.search.evidence import EvidenceSettings
from rlprompt.search.evolution import (
    Evolution,
    EvolutionSettings,
    admission_of,
    division_of,
    given_texts,
)
from rlprompt.search.operators import OperatorChoice
from rlprompt.search.rewriting import Failure
from rlprompt.search.ruler import Ruler
from rlprompt.search.trained_writer import TrainedWriter, WriterTraining
from rlprompt.types import Group, Query

ORIGIN = "written"
"""How a text came about that the writer has written."""


class RLSettings(SearchSettings):
    """Reinforcement learning over text: a writer under a soft prompt of its own learns."""

    type: Literal["rl"] = "rl"
    """Searcher."""
    task: str | None = None
    """What the writer is asked for, in the words of a user; null = to say what the best text so far
    says in other words."""
    group_size: int = Field(default=8, ge=2, le=1000)
    """Texts that the writer writes in a step."""
    population: int = Field(default=2, ge=1, le=1000)
    """Best texts so far that are tried again beside them."""
    texts: tuple[str, ...] = ()
    """System texts to begin with, beside the text of `prompt`."""
    temperature: float = Field(default=1.0, gt=0.0, le=10.0)
    """Of the writer's tokens."""
    max_tokens: int = Field(default=64, ge=1, le=4096)
    """Longest answer of the writer."""
    init_text: str = rewriting.SYSTEM
    """Text that the writer's own prompt begins as."""
    num_virtual_tokens: int | None = Field(default=None, ge=1, le=4096)
    """Positions of the writer's prompt; null = as many as `init_text` has."""
    lr_relative: float = Field(default=0.05, gt=0.0)
    """Learning rate of the writer's prompt, as of `training.optimizer`."""
    kl_coef: float = Field(default=0.02, ge=0.0)
    """Weight of the KL to the writer as it began."""
    length_penalty: float = Field(default=0.0, ge=0.0)
    """What every token takes off a text's reward."""
    max_length: int = Field(default=256, ge=1, le=2**20)
    """Longest text that is tried, in tokens."""
    evidence: EvidenceSettings | None = EvidenceSettings()
    """When a text counts as better than the incumbent; see the searcher `evolution`."""
    test_share: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Share of the training queries that is set apart for it; see the searcher `evolution`."""

    @field_validator("task", "init_text")
    @classmethod
    def _says_something(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("it is blank; write a text, or leave it out")
        return text

    @property
    def sampling(self) -> SamplingSettings:
        """How the writer draws: untruncated, so that the gradient is that of what was drawn."""
        return SamplingSettings(temperature=self.temperature, max_tokens=self.max_tokens)

    @property
    def as_evolution(self) -> EvolutionSettings:
        """What the rest of the search is told."""
        return EvolutionSettings(
            completions_per_query=self.completions_per_query,
            texts=self.texts,
            population=self.population,
            offspring=self.group_size,
            operators={"word": 1.0},
            library=False,
            length_penalty=self.length_penalty,
            max_length=self.max_length,
            evidence=self.evidence,
            test_share=self.test_share,
        )


class Policy(Breeder):
    """Gets new texts from the writer, and gives it back what they have earned."""

    def __init__(
        self, writer: TrainedWriter, task: str | None, admission: Admission, seed: int
    ) -> None:
        """Keep the parts.

        Args:
            writer: what writes and learns.
            task: what it is asked for; None = to reword the best text.
            admission: what says which texts may be tried.
            seed: seed of the updates.
        """
        super().__init__(OperatorChoice((ORIGIN,)), {}, admission, None)
        self.writer = writer
        self._task = task
        self._seed = seed
        self._drawn: Group | None = None
        self._earned: dict[str, float] = {}
        """What each text has earned, when it was new."""
        self.learned: Mapping[str, float] = {}
        """Metrics of the last update."""

    def breed(
        self,
        parents: Sequence[Parent],
        count: int,
        draw: random.Random,
        is_known: Callable[[str], bool],
        failures: Mapping[int, Sequence[Failure]],
    ) -> list[Proposal]:
        """What the writer writes in one group, less what may not be tried; see `Breeder.breed`."""
        del failures
        made: dict[str, Proposal] = {}
        if count < 2:  # no group
            return []
        request = rewriting.rephrasing(parents[0].text)
        if self._task is not None:
            request = Query(({"role": "user", "content": self._task},))
        above = () if self._task is not None else (parents[0].id,)
        self._drawn = self.writer.draw(request, count, draw.getrandbits(31))
        self.written += count
        for answer in self._drawn.completions:
            self._take(Proposal(rewriting.proposed(answer.text), above, ORIGIN), made, is_known)
        return list(made.values())

    def told(self, rewards: Mapping[str, float], step: int) -> None:
        """Let the writer learn from its last group.

        Args:
            rewards: what each new text has earned in this step.
            step: number of the step, for the order of the update.

        Raises:
            NotFiniteError: the update is not finite.
        """
        if self._drawn is None:
            return
        group, self._drawn = self._drawn, None
        self._earned |= {text_key(text): reward for text, reward in rewards.items()}
        texts = [text_key(rewriting.proposed(answer.text)) for answer in group.completions]
        found = [self._earned.get(text, math.nan) for text in texts]
        known = [reward for reward in found if not math.isnan(reward)]
        least = min(known, default=math.nan)
        refused = [
            math.isnan(r) and text not in self._earned for r, text in zip(found, texts, strict=True)
        ]
        earned = [least if no else reward for no, reward in zip(refused, found, strict=True)]
        self.learned = self.writer.learn(group, earned, self._seed + step)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values for `load_state_dict`; the writer's tensors are apart."""
        earned = [[text, None if math.isnan(r) else r] for text, r in self._earned.items()]
        return super().state_dict() | {"earned": earned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; see `Breeder.load_state_dict`."""
        super().load_state_dict(state)
        self._earned = {
            text: math.nan if reward is None else float(reward) for text, reward in state["earned"]
        }


class RL(Evolution):
    """Learns to write texts; see the module."""

    Settings: ClassVar[type[SearchSettings]] = RLSettings
    _breeder: Policy

    @classmethod
    def make(cls, settings: Any, given: SearchStart) -> Self:
        """The searcher of a recipe; see `Searcher.make`.

        Raises:
            InputError: there is no base whose prompt could be trained.
        """
        if given.engine is None or given.policy is None:
            raise InputError(
                "search.type: rl trains a prompt of the base that writes, and there is no base "
                "here, only outputs; use search.type: evolution"
            )
        training = WriterTraining(
            settings.init_text, settings.num_virtual_tokens, settings.lr_relative, settings.kl_coef
        )
        writer = TrainedWriter(given.engine, training, settings.sampling, given.seed)
        ruler, rest = Ruler(given), settings.as_evolution
        texts = given_texts(rest, given, ruler)
        own = texts if settings.task is None else [*texts, settings.task]
        admission = admission_of(rest, given, ruler, own)
        policy = Policy(writer, settings.task, admission, given.seed)
        return cls(rest, texts, policy, division_of(rest, given), ruler, given.seed)

    def _evolve(self, trials: Sequence[Trial]) -> None:
        """Let the writer learn first; then as evolution does."""
        new = {
            trial.candidate.prompt.init_text: trial.reward + self._worth(trial.candidate.id)
            for trial in trials
            if trial.candidate.origin == ORIGIN and trial.candidate.id not in self._members
        }
        self._breeder.told(new, self._step)
        super()._evolve(trials)

    @property
    def metrics(self) -> Mapping[str, float]:
        """Those of evolution, and how the writer's last update went."""
        own = {f"writer/{name}": value for name, value in self._breeder.learned.items()}
        return {**super().metrics, **own, "writer/updates": float(self._breeder.writer.updates)}

    def state(self) -> LearnerState:
        """That of evolution, and the writer's."""
        state, writer = super().state(), self._breeder.writer.state()
        tensors = {f"writer/{name}": tensor for name, tensor in writer.tensors.items()}
        return LearnerState(
            {**state.tensors, **tensors}, {**state.plain, "writer": dict(writer.plain)}
        )

    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken; see `Searcher.restore`."""
        if "writer" not in state.plain:
            raise ValueError("no writer was trained in it")
        super().restore(state)
        own = LearnerState(named_under(state.tensors, "writer"), state.plain["writer"])
        self._breeder.writer.restore(own)
