"""Held-out evaluation as a recipe asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlprompt.distributed.ranks import Ranks
from rlprompt.engines.base import Engine
from rlprompt.evaluation.heldout import Criterion, HeldoutEvaluator
from rlprompt.evaluation.measures import (
    BaseKL,
    BaseLogprob,
    Measure,
    QueryInformation,
    TargetLogprob,
    TeacherKL,
)
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.recipe.schema import Recipe
from rlprompt.rewards import RewardRunner
from rlprompt.rollout.sources import given_completion
from rlprompt.types import Group, Query

_HELDOUT_SEED = 1_000_003
"""Keeps held-out draws apart from those of every training step."""


def evaluator_of(
    recipe: Recipe,
    split: Sequence[Query],
    policy: Policy,
    engine: Engine,
    rewards: RewardRunner,
    teacher: Prompt | None,
    ranks: Ranks | None = None,
) -> HeldoutEvaluator:
    """Evaluation on a split; without a score, closeness to teacher or answers is what counts.

    Args:
        recipe: the recipe.
        split: queries of the split.
        policy: policy over the base.
        engine: engine that draws the completions.
        rewards: rewards that score them.
        teacher: prompt of the teacher; None without one.
        ranks: ranks that divide the measures; None when this process is alone.
    """
    settings, budget = recipe.evaluation, recipe.training.token_budget
    queries = split[: settings.max_queries]
    measures: dict[str, Measure] = {
        "base_logprob": BaseLogprob(policy, budget, ranks),
        "base_kl": BaseKL(policy, budget, ranks),
    }
    if settings.query_information:
        measures["query_information"] = QueryInformation(policy, budget, ranks)
    criterion: Criterion | None = None
    columns = recipe.algorithm.answer_columns[:1]
    if columns and queries:
        answers = [Group(q, (given_completion(policy, q, columns[0]),)) for q in queries]
        measures["target_logprob"] = TargetLogprob(policy, answers, budget, ranks)
        criterion = Criterion("target_logprob")
    if teacher is not None and queries:

        def write(prompt: Prompt) -> Sequence[Group]:
            engine.sync(prompt)
            return engine.generate(queries, 1, recipe.sampling, _heldout_seed(recipe) + 1).groups

        measures["teacher_kl"] = TeacherKL(policy, teacher, write, budget, ranks)
        criterion = Criterion("teacher_kl", -1.0)
    return heldout_of(recipe, split, engine, rewards, measures, criterion)


def _heldout_seed(recipe: Recipe) -> int:
    return recipe.seed + _HELDOUT_SEED


def heldout_of(
    recipe: Recipe,
    split: Sequence[Query],
    engine: Engine,
    rewards: RewardRunner,
    measures: Mapping[str, Measure],
    criterion: Criterion | None,
) -> HeldoutEvaluator:
    """Evaluation on a split, as the recipe asks for it.

    Args:
        recipe: the recipe.
        split: queries of the split.
        engine: engine that draws the completions.
        rewards: rewards that score them.
        measures: further numbers, by name.
        criterion: measure that counts where no reward has a score.
    """
    settings = recipe.evaluation
    scored = any(reward.role == "score" for reward in recipe.rewards)
    return HeldoutEvaluator(
        engine,
        rewards,
        split[: settings.max_queries],
        recipe.sampling,
        completions_per_query=settings.completions_per_query,
        seed=_heldout_seed(recipe),
        measures=measures,
        criterion=None if scored else criterion,
    )
