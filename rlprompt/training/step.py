"""One gradient step on one page: a batch, what it is worth, the updates, and what is logged.

    source.collect            completions drawn under the prompt and scored, or given by the dataset
      -> training rewards     normalised, weighted, gated, less the multipliers' penalties
      -> updater.learn        the algorithm's signal and losses, backward, optimizer
      -> constraints.update   multipliers move by the batch's violations

Nothing here asks which algorithm it is. A run (`rlprompt.runs`) sees this through the protocol
`Learner` and knows no gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from rlprompt.algorithms.base import Algorithm
from rlprompt.algorithms.constraints import Constraints
from rlprompt.algorithms.robust import QueryWeights
from rlprompt.distributed.ranks import Ranks
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.rewards.runner import RewardRunner
from rlprompt.rollout.collect import (
    RolloutBatch,
    completion_metrics,
    completion_rows,
    logged_metrics,
)
from rlprompt.rollout.prefetch import WAITED
from rlprompt.rollout.sources import Source
from rlprompt.runs.learner import LearnerState, NotFiniteError, StepResult, named_under
from rlprompt.runs.signal import missing_signal
from rlprompt.training.optimizer import (
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    lr_factor,
    optimizer_tensors,
)
from rlprompt.training.settings import TrainingSettings
from rlprompt.training.startup import check_trainable
from rlprompt.training.update import PhaseClock, Updater
from rlprompt.types import Query, Stateful

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepParts:
    """What a gradient step is made of."""

    policy: Policy
    """With the prompt that is trained."""
    algorithm: Algorithm
    """How the prompt learns."""
    source: Source
    """Where its batches come from."""
    rewards: RewardRunner
    """What is rewarded."""
    settings: TrainingSettings
    """Steps, optimizer, memory."""
    probe: Query
    """Any training query, for the check that the prompt can be learned."""
    learns_from_rewards: bool = True
    """False where the algorithm takes its signal from given answers or a teacher."""
    reference: Prompt | None = None
    """Prompt of the reference policy; None when the algorithm needs none."""
    teacher: Prompt | None = None
    """Prompt of the teacher; None when the algorithm needs none."""
    constraints: Constraints | None = None
    """Multipliers of constraint rewards; None without any."""
    query_weights: QueryWeights | None = None
    """A robust objective; None when all queries count alike."""
    ranks: Ranks = field(default_factory=Ranks)
    """Among whom the work is divided; alone by default."""
    importance_cap: float | None = None
    """Largest weight that corrects for how the engine drew tokens; None when none does."""


class GradientStep:
    """Learns a prompt by gradients; implements `rlprompt.runs.learner.Learner`."""

    def __init__(self, parts: StepParts) -> None:
        """Join the parts and prove that the prompt can be learned.

        Raises:
            InputError: it cannot (see `check_trainable`).
        """
        self.parts = parts
        policy, algorithm = parts.policy, parts.algorithm
        peak_lr = learning_rate(parts.settings.optimizer, policy.prompt.scale(policy))
        own = algorithm.own_parameters()
        self.optimizer = build_optimizer(
            policy.parameters(), parts.settings.optimizer, peak_lr, own
        )
        check_trainable(policy, self.optimizer, parts.probe, [part.parameters for part in own])
        self.updater = Updater(
            policy,
            algorithm,
            parts.reference,
            temperature=parts.source.temperature,
            token_budget=parts.settings.token_budget,
            teacher=parts.teacher,
            query_weights=parts.query_weights,
            ranks=parts.ranks,
            importance_cap=parts.importance_cap,
        )
        parts.ranks.copy_first(self.updater.trained)
        self._updates = 0
        queries = parts.settings.queries_per_step
        if algorithm.num_minibatches > queries:
            logger.warning(
                "algorithm.num_minibatches is %d and training.queries_per_step is %d: each pass "
                "makes %d updates, one per query",
                algorithm.num_minibatches,
                queries,
                queries,
            )

    @property
    def prompt(self) -> Prompt:
        """The prompt that is trained."""
        return self.parts.policy.prompt

    @property
    def is_over(self) -> bool:
        """Never: a gradient can always be followed further."""
        return False

    @property
    def tried(self) -> Sequence[Mapping[str, Any]]:
        """Nothing: there is one prompt."""
        return ()

    def step(
        self, step: int, seed: int, *, next_seed: int | None = None, time_share: float = 0.0
    ) -> StepResult:
        """Collect a batch and learn from it; see `Learner.step`."""
        parts, clock = self.parts, PhaseClock()
        batch = parts.source.collect(step, seed)
        rewards = parts.rewards.training_rewards(batch.rewards)
        if parts.constraints is not None:
            rewards = parts.constraints.penalised(rewards, batch.rewards.costs)
        try:
            with self._prefetching(step + 1, next_seed) as meanwhile:
                signal, learned = self.updater.learn(
                    batch,
                    self.optimizer,
                    lambda: self._next_lr(time_share),
                    parts.settings.optimizer.max_grad_norm,
                    clock,
                    seed=seed,
                    rewards=rewards,
                )
        except NotFiniteError as error:
            raise NotFiniteError(str(error), completion_rows(batch, "train", "learned")) from error
        metrics = {**completion_metrics(batch), **learned, **meanwhile, **self._adapt(batch)}
        return StepResult(
            metrics={**metrics, "epoch": parts.source.epoch},
            rows=completion_rows(batch, "train", "learned", signal.row_advantages),
            num_tokens=int(batch.lengths.sum()),
            rollout_seconds=batch.rollout_seconds,
            logged=logged_metrics(batch),
            phases=_phases(batch, clock, meanwhile.get(WAITED, 0.0)),
            no_signal=(
                missing_signal(rewards, signal.advantages) if parts.learns_from_rewards else None
            ),
        )

    def prompt_state(self) -> LearnerState:
        """The prompt's tensors."""
        tensors = self.prompt.state_dict()
        return LearnerState({name: tensor.clone() for name, tensor in tensors.items()}, {})

    def restored_prompt(self, state: LearnerState) -> Prompt:
        """A copy of the prompt with those tensors; see `Learner.restored_prompt`."""
        prompt = self.prompt.copy()
        prompt.load_state_dict(dict(state.tensors))
        return prompt

    def state(self) -> LearnerState:
        """Prompt, optimizer, whatever adapts, and the position in the data."""
        parts: Mapping[str, Prompt | Stateful] = {"prompt": self.prompt, **self._adapting}
        tensors = {
            f"{name}/{key}": value
            for name, part in parts.items()
            for key, value in part.state_dict().items()
        }
        tensors |= optimizer_tensors(self.optimizer, "optimizer")
        return LearnerState(
            {name: tensor.clone() for name, tensor in tensors.items()},
            {"source": self.parts.source.state_dict(), "updates": self._updates},
        )

    def restore(self, state: LearnerState) -> None:
        """Take over what `state` gave; see `Learner.restore`."""
        self.prompt.load_state_dict(named_under(state.tensors, "prompt"))
        for name, part in self._adapting.items():
            part.load_state_dict(named_under(state.tensors, name))
        load_optimizer_tensors(self.optimizer, state.tensors, "optimizer")
        self.parts.source.load_state_dict(state.plain["source"])
        self._updates = int(state.plain["updates"])

    def close(self) -> None:
        """End threads and processes of source and rewards."""
        self.parts.source.close()
        self.parts.rewards.close()

    @property
    def _adapting(self) -> Mapping[str, Stateful]:
        """What learns or adapts beside the prompt, by the name of its tensors in a checkpoint."""
        parts = self.parts
        found: dict[str, Stateful] = {"algorithm": parts.algorithm, "rewards": parts.rewards}
        if parts.constraints is not None:
            found["constraints"] = parts.constraints
        if parts.query_weights is not None:
            found["robust"] = parts.query_weights
        return found | dict(parts.source.others)

    def _prefetching(
        self, following: int, seed: int | None
    ) -> AbstractContextManager[dict[str, float]]:
        """A block in which the source may draw the next batch, if there is a next step."""
        return nullcontext({}) if seed is None else self.parts.source.prefetch(following, seed)

    def _next_lr(self, time_share: float) -> float:
        """Set the learning rate of the coming update."""
        settings = self.parts.settings
        total = settings.steps * self.updater.updates_on(settings.queries_per_step)
        factor = lr_factor(settings.optimizer, self._updates, total, time_share)
        groups = self.optimizer.param_groups
        for group in groups:
            group["lr"] = factor * group["peak_lr"]
        self._updates += 1
        return float(groups[0]["lr"])

    def _adapt(self, batch: RolloutBatch) -> dict[str, float]:
        """Let everything that adapts look at a learned batch; gives its metrics."""
        parts = self.parts
        metrics = {f"prompt/{k}": v for k, v in parts.policy.prompt.metrics().items()}
        if parts.constraints is not None:
            metrics |= parts.constraints.update(batch.rewards.costs)
        if parts.query_weights is not None:
            metrics |= parts.query_weights.metrics()
        return metrics


def _phases(batch: RolloutBatch, clock: PhaseClock, waited: float) -> dict[str, float]:
    """Seconds of a step by phase.

    A batch that was drawn ahead took none of this step; to wait for the next one counts as rollout.
    """
    drew = 0.0 if batch.prefetched else 1.0
    return {
        "rollout": drew * batch.rollout_seconds + waited,
        "reward": drew * batch.reward_seconds,
        **clock.seconds,
    }
