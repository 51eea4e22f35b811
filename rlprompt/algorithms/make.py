"""Every algorithm: the settings that a recipe may hold, and what makes the algorithm of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from rlprompt.algorithms.base import Algorithm, AlgorithmSettings
from rlprompt.algorithms.distill import Distill
from rlprompt.algorithms.dpo import DPO
from rlprompt.algorithms.grpo import GRPO
from rlprompt.algorithms.ppo import PPO
from rlprompt.algorithms.reinforce import RLOO, Reinforce
from rlprompt.algorithms.supervised import Supervised
from rlprompt.policy import Policy
from rlprompt.settings import OneOf

ALGORITHMS: Mapping[str, type[Algorithm]] = {
    "grpo": GRPO,
    "rloo": RLOO,
    "reinforce": Reinforce,
    "ppo": PPO,
    "supervised": Supervised,
    "dpo": DPO,
    "distill": Distill,
}
"""The built-in algorithms: what `algorithm.type` says -> the class."""

DEFAULT = "grpo"
"""The algorithm of a recipe that names none."""

AnyAlgorithmSettings = Annotated[
    AlgorithmSettings,
    OneOf({name: each.Settings for name, each in ALGORITHMS.items()}, default=DEFAULT),
]


def make_algorithm(
    settings: AlgorithmSettings, policy: Policy, max_tokens: int, seed: int
) -> Algorithm:
    """The algorithm that a recipe describes; arguments and errors are those of `Algorithm.make`."""
    kind: type[Algorithm] = settings.user_class or ALGORITHMS[settings.type]
    return kind.make(settings, policy, max_tokens, seed)
