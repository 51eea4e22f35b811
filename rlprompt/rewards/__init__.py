"""Rewards: TRL reward functions named by path, built-in rules, and the runner that scores batches.

`BUILTIN` is the whole registry. Rewards that users write need no entry anywhere: a recipe names
their file (see `reward_models/` in the checkout).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlprompt.errors import InputError
from rlprompt.rewards.base import (
    Example,
    IsolationSettings,
    LoadedReward,
    RewardBatch,
    RewardFailure,
    RewardFunction,
    RewardSettings,
    TrainerState,
)
from rlprompt.rewards.load import load_reward
from rlprompt.rewards.processes.isolation import IsolatedReward
from rlprompt.rewards.sharing import Elsewhere, OneRank, RankGroup

if TYPE_CHECKING:
    from rlprompt.rewards.runner import RewardRunner

BUILTIN: dict[str, str] = {
    "diversity": "rlprompt.rewards.rules.diversity:Diversity",
    "exact": "rlprompt.rewards.rules.exact:Exact",
    "format": "rlprompt.rewards.rules.format:Format",
    "keyword": "rlprompt.rewards.rules.keyword:Keyword",
    "language": "rlprompt.rewards.rules.language:Language",
    "length": "rlprompt.rewards.rules.length:Length",
    "refusal": "rlprompt.rewards.rules.refusal:Refusal",
    "relevance": "rlprompt.rewards.rules.relevance:Relevance",
    "repetition": "rlprompt.rewards.rules.repetition:Repetition",
    "sentence": "rlprompt.rewards.rules.sentence:Sentence",
}
"""Rules: name after `builtin:` -> where it is defined; imported only when a recipe names it."""

MODELS: dict[str, str] = {
    "http": "rlprompt.rewards.models.http_reward:ServerReward",
    "judge": "rlprompt.rewards.models.judge:JudgeReward",
    "openai_judge": "rlprompt.rewards.models.api_judge:OpenAIJudge",
    "pairwise": "rlprompt.rewards.models.pairwise:PairwiseReward",
    "preference": "rlprompt.rewards.models.preference:PreferenceReward",
    "preference_ensemble": "rlprompt.rewards.models.preference:EnsembleReward",
}
"""Rewards that ask a model or a server, named in the same way."""

NAMED: dict[str, str] = BUILTIN | MODELS
"""All that `builtin:` can name."""


def __getattr__(name: str) -> Any:
    # The runner needs torch, which a reward's worker process must not wait for.
    if name == "RewardRunner":
        return import_module("rlprompt.rewards.runner").RewardRunner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build_rewards(
    settings: Sequence[RewardSettings],
    base_dir: Path,
    *,
    needs_score: bool = True,
    given: Mapping[str, Any] | None = None,
    ranks: RankGroup | None = None,
) -> RewardRunner:
    """Load the rewards of a recipe.

    Args:
        settings: the rewards, in the order in which they are called and logged.
        base_dir: the recipe's folder, to which file paths are relative.
        needs_score: whether one must have the role `score`.
        given: reward functions in memory, by the path that stands for them.
        ranks: ranks that share the scoring, all of which call this; None when this process is
            alone.

    Raises:
        InputError: a reward cannot be loaded, two share a name, or none has the role `score` though
            one is needed.
    """
    from rlprompt.rewards.runner import RewardRunner

    group = ranks or OneRank()
    loaded = [_loaded_among(group, each, base_dir, given or {}) for each in settings]
    runner = RewardRunner(loaded, needs_score=needs_score)
    runner.spread(group)
    return runner


def _loaded_among(
    ranks: RankGroup, settings: RewardSettings, base_dir: Path, given: Mapping[str, Any]
) -> LoadedReward:
    """A reward as this rank needs it: one with `ranks: first` is loaded on the first rank only."""
    if settings.ranks != "first" or ranks.size == 1:
        return _loaded(settings, base_dir, given)
    made: list[LoadedReward] = []

    def load() -> Elsewhere:
        made.append(_loaded(settings, base_dir, given))
        function = made[0].function
        return Elsewhere(
            needs_base=bool(getattr(function, "needs_base", False)),
            needs_all_ranks=bool(getattr(function, "needs_all_ranks", False)),
        )

    stand_in = ranks.first(load, f"the reward '{settings.name}'")
    return made[0] if made else LoadedReward(settings, stand_in)


def _loaded(settings: RewardSettings, base_dir: Path, given: Mapping[str, Any]) -> LoadedReward:
    function = _load(settings, base_dir, given)
    is_here = settings.path in given or settings.isolation is not None
    # A judge lends the run's base, and shards of a model talk to other ranks: both stay here.
    is_bound = hasattr(function, "bind_policy") or getattr(function, "needs_all_ranks", False)
    isolate = None if is_here or is_bound else partial(in_main_thread, settings, base_dir)
    return LoadedReward(settings, function, isolate)


def in_main_thread(settings: RewardSettings, base_dir: Path) -> RewardFunction:
    """The reward in a process of its own for the sake of that process's main thread.

    It may use as much memory as it would in the run.

    Raises:
        InputError: it cannot be loaded there.
    """
    isolation = IsolationSettings(memory_gb=None)
    return IsolatedReward(settings.model_copy(update={"isolation": isolation}), base_dir, NAMED)


def _load(settings: RewardSettings, base_dir: Path, given: Mapping[str, Any]) -> RewardFunction:
    if settings.isolation is not None:
        if settings.path in given:
            raise InputError(
                f"reward '{settings.name}' is a Python object, which a worker process cannot load; "
                "write it into a file and name it as path/file.py:object, or remove isolation"
            )
        return IsolatedReward(settings, base_dir, NAMED)
    return load_reward(settings, base_dir, NAMED, given)


__all__ = [
    "BUILTIN",
    "MODELS",
    "NAMED",
    "Example",
    "LoadedReward",
    "RewardBatch",
    "RewardFailure",
    "RewardFunction",
    "RewardRunner",
    "RewardSettings",
    "TrainerState",
    "build_rewards",
    "load_reward",
]
