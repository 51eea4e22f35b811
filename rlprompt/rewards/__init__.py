"""Rewards: TRL reward functions named by path, built-in rules, and the runner that scores batches.

`BUILTIN` is the whole registry. Rewards that users write need no entry anywhere: a recipe names
their file (see `reward_models/` in the checkout).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlprompt.rewards.base import (
    Example,
    RewardBatch,
    RewardFailure,
    RewardFunction,
    RewardSettings,
    TrainerState,
)
from rlprompt.rewards.load import load_reward
from rlprompt.rewards.runner import RewardRunner

BUILTIN: dict[str, str] = {
    "diversity": "rlprompt.rewards.diversity:Diversity",
    "exact": "rlprompt.rewards.exact:Exact",
    "format": "rlprompt.rewards.format:Format",
    "keyword": "rlprompt.rewards.keyword:Keyword",
    "language": "rlprompt.rewards.language:Language",
    "length": "rlprompt.rewards.length:Length",
    "refusal": "rlprompt.rewards.refusal:Refusal",
    "relevance": "rlprompt.rewards.relevance:Relevance",
    "repetition": "rlprompt.rewards.repetition:Repetition",
    "sentence": "rlprompt.rewards.sentence:Sentence",
}
"""Name after `builtin:` -> where it is defined; imported only when a recipe names it."""


def build_rewards(
    settings: Sequence[RewardSettings], base_dir: Path, *, needs_score: bool = True
) -> RewardRunner:
    """Load the rewards of a recipe.

    Args:
        settings: the rewards, in the order in which they are called and logged.
        base_dir: the recipe's folder, to which file paths are relative.
        needs_score: whether one must have the role `score`.

    Raises:
        InputError: a reward cannot be loaded, two share a name, or none has the role `score` though
            one is needed.
    """
    loaded = [(each, load_reward(each, base_dir, BUILTIN)) for each in settings]
    return RewardRunner(loaded, needs_score=needs_score)


__all__ = [
    "BUILTIN",
    "Example",
    "RewardBatch",
    "RewardFailure",
    "RewardFunction",
    "RewardRunner",
    "RewardSettings",
    "TrainerState",
    "build_rewards",
    "load_reward",
]
