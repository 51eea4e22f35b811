"""Every algorithm: the settings that a recipe may hold, and what makes the algorithm of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from rlprompt.algorithms.base import Algorithm
from rlprompt.algorithms.distill import Distill, DistillSettings
from rlprompt.algorithms.dpo import DPO, DPOSettings
from rlprompt.algorithms.grpo import GRPO, GRPOSettings
from rlprompt.algorithms.ppo import PPO, BaseShape, PPOSettings
from rlprompt.algorithms.reinforce import RLOO, Reinforce, ReinforceSettings, RLOOSettings
from rlprompt.algorithms.supervised import Supervised, SupervisedSettings
from rlprompt.policy import Policy

AnyAlgorithmSettings = Annotated[
    GRPOSettings
    | RLOOSettings
    | ReinforceSettings
    | PPOSettings
    | SupervisedSettings
    | DPOSettings
    | DistillSettings,
    Field(discriminator="type"),
]


class Surroundings(NamedTuple):
    """What an algorithm may be told of the run."""

    policy: Policy
    max_tokens: int
    """The sampling limit."""
    seed: int
    """Of an algorithm's own parameters."""


def _ppo(settings: PPOSettings, given: Surroundings) -> PPO:
    base = given.policy.base
    shape = BaseShape(base.hidden_size, base.device, base.dtype)
    return PPO(settings, given.max_tokens, shape, given.seed)


ALGORITHMS: Mapping[str, Callable[[Any, Surroundings], Algorithm]] = {
    "grpo": lambda settings, given: GRPO(settings, given.max_tokens),
    "rloo": lambda settings, given: RLOO(settings, given.max_tokens),
    "reinforce": lambda settings, given: Reinforce(settings, given.max_tokens),
    "ppo": _ppo,
    "supervised": lambda settings, given: Supervised(settings),
    "dpo": lambda settings, given: DPO(settings),
    "distill": lambda settings, given: Distill(settings, given.policy.forward.head),
}
"""`algorithm.type` -> how the algorithm is made of its settings."""


def make_algorithm(settings: AnyAlgorithmSettings, given: Surroundings) -> Algorithm:
    """An algorithm as a recipe describes it.

    Raises:
        InputError: its settings do not fit the sampling limit.
    """
    return ALGORITHMS[settings.type](settings, given)
