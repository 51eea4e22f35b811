"""A writer that learns: the base under a soft prompt of its own, trained on what its texts earn.

    draw     n answers to one request, under the writer's prompt
    learn    one GRPO update of that prompt (Shao et al., 2024, arXiv 2402.03300): a text's reward
             is the mean reward of the completions that the target has given under it

The writer's prompt begins as a text, and is held near it by a KL term. The target's prompt and
the writer's share nothing but the frozen base.

Letters: n answers of a draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlprompt.algorithms.base import Algorithm
from rlprompt.algorithms.grpo import GRPOSettings
from rlprompt.algorithms.make import make_algorithm
from rlprompt.engines.base import Engine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.prompts.base import Prompt, load_nothing
from rlprompt.prompts.make import make_prompt
from rlprompt.prompts.soft import SoftSettings
from rlprompt.rewards.base import RewardBatch
from rlprompt.rollout.collect import RolloutBatch
from rlprompt.runs.learner import LearnerState, named_under
from rlprompt.training.optimizer import (
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)
from rlprompt.training.settings import OptimizerSettings
from rlprompt.training.update import PhaseClock, Updater
from rlprompt.types import Group, Query

_TOKEN_BUDGET = 1024


@dataclass(frozen=True)
class WriterTraining:
    """How the writer learns."""

    init_text: str
    """Text that its prompt begins as."""
    num_virtual_tokens: int | None
    """Positions of its prompt; None = as many as the text has."""
    lr_relative: float
    """Learning rate as a share of the prompt's natural size."""
    kl_coef: float
    """Weight of the KL to the prompt that it began with."""
    max_grad_norm: float | None = 1.0
    """Largest norm of a gradient."""


class TrainedWriter:
    """The base under a soft prompt that GRPO trains."""

    def __init__(
        self, engine: Engine, training: WriterTraining, sampling: SamplingSettings, seed: int
    ) -> None:
        """Make the writer's prompt; nothing is drawn yet.

        Args:
            engine: the run's engine; another prompt must be synced before it is drawn with again.
            training: how the writer learns.
            sampling: how its tokens are drawn.
            seed: seed of the prompt.

        Raises:
            InputError: the text that it begins as has no tokens, or cannot stand in the slot.
        """
        self._engine = engine
        self._sampling = sampling
        self._policy = engine.policy.sibling()
        settings = SoftSettings(
            init_text=training.init_text, num_virtual_tokens=training.num_virtual_tokens
        )
        self._policy.prompt = make_prompt(settings, self._policy, seed, load_nothing)
        self._reference = self._policy.prompt.copy()
        self._training = training
        rate = learning_rate(
            OptimizerSettings(lr_relative=training.lr_relative),
            self._policy.prompt.scale(self._policy),
        )
        self._optimizer = build_optimizer(
            self._policy.parameters(), OptimizerSettings(schedule="constant"), rate
        )
        self._updates = 0
        self._rate = rate

    @property
    def prompt(self) -> Prompt:
        """The writer's own prompt as it is now."""
        return self._policy.prompt

    @property
    def updates(self) -> int:
        """Updates so far."""
        return self._updates

    def draw(self, request: Query, count: int, seed: int) -> Group:
        """Answers to a request.

        Args:
            request: what the writer is asked.
            count: the number of answers, n.
            seed: seed of the draw.
        """
        self._engine.sync(self._policy.prompt)
        (group,) = self._engine.generate([request], count, self._sampling, seed).groups
        return group

    def learn(self, group: Group, rewards: Sequence[float], seed: int) -> dict[str, float]:
        """One update by what the answers have earned.

        Args:
            group: what `draw` gave last.
            rewards: n rewards, NaN where none is known; where all that are known are equal nothing
                is learned.
            seed: seed of the update.

        Returns:
            Metrics of the update; empty where there was none.

        Raises:
            NotFiniteError: the update is not finite.
        """
        total = torch.tensor(rewards, dtype=torch.float32)
        known = total[~total.isnan()]
        if known.numel() < 2 or float(known.max() - known.min()) < 1e-8:
            return {}
        updater = Updater(
            self._policy,
            self._algorithm(len(total)),
            self._reference if self._training.kl_coef else None,
            temperature=self._sampling.temperature,
            token_budget=_TOKEN_BUDGET,
        )
        _, metrics = updater.learn(
            RolloutBatch((group,), _scored(total), 0.0, 0.0),
            self._optimizer,
            lambda: self._rate,
            self._training.max_grad_norm,
            PhaseClock(),
            seed=seed,
        )
        self._updates += 1
        return metrics

    def _algorithm(self, count: int) -> Algorithm:
        settings = GRPOSettings(group_size=count, kl_coef=self._training.kl_coef)
        return make_algorithm(settings, self._policy, self._sampling.max_tokens, 0)

    def state(self) -> LearnerState:
        """Prompt and optimizer."""
        tensors = {f"prompt/{k}": v for k, v in self._policy.prompt.state_dict().items()}
        tensors |= optimizer_tensors(self._optimizer, "optimizer")
        plain = {"updates": self._updates}
        return LearnerState({name: each.clone() for name, each in tensors.items()}, plain)

    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: it was another kind of prompt.
        """
        self._policy.prompt.load_state_dict(named_under(state.tensors, "prompt"))
        load_optimizer_tensors(self._optimizer, state.tensors, "optimizer")
        self._updates = int(state.plain["updates"])


def _scored(total: torch.Tensor) -> RewardBatch:
    return RewardBatch(
        total=total,
        values={},
        weights={},
        roles={},
        extras={},
        metrics={},
        errors=[],
        group_index=tuple([0] * len(total)),
    )
