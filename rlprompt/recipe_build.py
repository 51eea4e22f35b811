"""From a recipe to a run: the one place that builds every object that a recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rlprompt.algorithms.base import Algorithm
from rlprompt.algorithms.make import Surroundings, make_algorithm
from rlprompt.artifacts.format import load_artifact
from rlprompt.data import QuerySampler, load_queries
from rlprompt.data.augment import Augmenter
from rlprompt.data.base import QuerySplit
from rlprompt.engines.base import Engine
from rlprompt.engines.native import NativeEngine
from rlprompt.errors import InputError
from rlprompt.evaluation.heldout import HeldoutEvaluator, Objective
from rlprompt.evaluation.probes import BaseLogprob, Probe, TargetLogprob, TeacherKL
from rlprompt.model.base import ModelSettings, load_base
from rlprompt.model.slot import ChatSlot
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.make import make_prompt
from rlprompt.prompts.text import NonePrompt, TextPrompt, TextSettings
from rlprompt.recipe import InitialReference, Recipe, Reference, TextReference, with_template_text
from rlprompt.rewards import RewardRunner, build_rewards
from rlprompt.training.guards import GuardWatch
from rlprompt.training.loop import Trainer
from rlprompt.training.objective import Constraints, QueryWeights
from rlprompt.training.parts import RunParts
from rlprompt.training.sources import ColumnSource, RolloutSource, Source, given_completion
from rlprompt.training.tracking import build_trackers
from rlprompt.types import Group

_HELDOUT_SEED = 1_000_003
"""Keeps held-out draws apart from those of every training step."""


def build_trainer(
    recipe: Recipe, base_dir: Path, output: Path, console: Console | None = None
) -> Trainer:
    """Build every object that a recipe names.

    Cheap things come first, so that a wrong recipe fails before the model is loaded.

    Args:
        recipe: what to run.
        base_dir: the recipe's folder; its paths are relative to it.
        output: the run folder.
        console: where the live display goes.

    Raises:
        InputError: anything named by the recipe cannot be had.
    """
    if isinstance(recipe.prompt, TextSettings):
        raise InputError(
            "prompt.type is text, which has nothing to train; evaluate it with `rlprompt eval`, or "
            "set prompt.type: soft and give the text as prompt.init_text"
        )
    recipe = with_template_text(recipe, base_dir)
    data = load_queries(recipe.data, base_dir)
    needs_score = recipe.algorithm.needs_rewards
    rewards = build_rewards(recipe.rewards, base_dir, needs_score=needs_score)
    trackers = build_trackers(recipe.tracking, console)
    policy = build_policy(recipe.model)
    rewards.bind_policy(policy)
    policy.prompt = build_prompt(recipe, policy, base_dir)
    policy.gradient_checkpointing = recipe.training.gradient_checkpointing
    given = Surroundings(policy, recipe.sampling.max_tokens, recipe.seed)
    algorithm = make_algorithm(recipe.algorithm, given)
    needs_reference = recipe.algorithm.needs_reference
    teacher = _teacher(recipe)
    engine = NativeEngine(policy, recipe.engine)
    parts = RunParts(
        name=recipe.name,
        policy=policy,
        algorithm=algorithm,
        source=_source(recipe, data, policy, engine, rewards, algorithm, teacher),
        reference=_reference(recipe.reference, policy.prompt) if needs_reference else None,
        teacher=teacher,
        constraints=_constraints(recipe, rewards),
        query_weights=_query_weights(recipe, data),
        evaluator=_evaluator(recipe, data, policy, engine, rewards, teacher),
        rewards=rewards,
        data=data,
        training=recipe.training,
        evaluation=recipe.evaluation,
        trackers=trackers,
        seed=recipe.seed,
        recipe=recipe.plain(),
        guards=GuardWatch(recipe.guards),
    )
    return Trainer(parts, output)


def build_evaluator(recipe: Recipe, base_dir: Path) -> tuple[Policy, HeldoutEvaluator]:
    """What scores prompts on a recipe's held-out queries, and the policy to make them on.

    Raises:
        InputError: anything named by the recipe cannot be had, or no query is held out.
    """
    recipe = with_template_text(recipe, base_dir)
    data = load_queries(recipe.data, base_dir)
    if not data.heldout:
        raise InputError(
            "the recipe holds no queries out (data.heldout is 0), so there is nothing to evaluate "
            "on; set data.heldout as it was in training"
        )
    needs_score = recipe.algorithm.needs_rewards
    rewards = build_rewards(recipe.rewards, base_dir, needs_score=needs_score)
    policy = build_policy(recipe.model)
    engine = NativeEngine(policy, recipe.engine)
    return policy, _evaluator(recipe, data, policy, engine, rewards, _teacher(recipe))


def build_prompt(recipe: Recipe, policy: Policy, base_dir: Path) -> Prompt:
    """The prompt of a recipe before training.

    Raises:
        InputError: see `make_prompt`, and `load_artifact` for the artifact that it starts from.
    """

    def load(path: str) -> Prompt:
        return load_artifact(base_dir / path, policy)

    return make_prompt(recipe.prompt, policy, recipe.seed, load)


def build_policy(settings: ModelSettings) -> Policy:
    """A base with its chat slot, and no prompt yet.

    A template's path in these settings is relative to the working directory.

    Raises:
        InputError: see `load_base`, `ChatSlot.from_tokenizer` and `Policy`.
    """
    base = load_base(settings)
    return Policy(base, ChatSlot.from_tokenizer(base.tokenizer, settings.template))


def _source(
    recipe: Recipe,
    data: QuerySplit,
    policy: Policy,
    engine: Engine,
    rewards: RewardRunner,
    algorithm: Algorithm,
    teacher: Prompt | None,
) -> Source:
    """The source that the algorithm's settings name.

    Raises:
        InputError: the dataset is too small, or lacks the answers.
    """
    count, size = len(data.train), recipe.training.queries_per_step
    if size > count:
        raise InputError(
            f"training.queries_per_step is {size}, the dataset has {count} training queries; "
            "lower it or add queries"
        )
    sampler = QuerySampler(count, size, recipe.seed)
    augment = Augmenter(recipe.augment, data.train) if recipe.augment else None
    columns = recipe.algorithm.answer_columns
    if columns:
        return ColumnSource(data.train, sampler, policy, columns, augment)
    prompt = policy.prompt
    if recipe.algorithm.draws_from_teacher:
        assert teacher is not None
        prompt = teacher
    return RolloutSource(
        data.train, sampler, engine, prompt, rewards, algorithm, recipe.sampling, augment
    )


def _teacher(recipe: Recipe) -> Prompt | None:
    text = recipe.algorithm.teacher_text
    return None if text is None else TextPrompt(text)


def _constraints(recipe: Recipe, rewards: RewardRunner) -> Constraints | None:
    limits = rewards.cost_limits
    return Constraints(recipe.constraints, limits) if limits else None


def _query_weights(recipe: Recipe, data: QuerySplit) -> QueryWeights | None:
    if recipe.robust is None:
        return None
    uses_rewards = recipe.algorithm.needs_rewards
    return QueryWeights(recipe.robust, data.train, uses_rewards=uses_rewards)


def _evaluator(
    recipe: Recipe,
    data: QuerySplit,
    policy: Policy,
    engine: Engine,
    rewards: RewardRunner,
    teacher: Prompt | None,
) -> HeldoutEvaluator:
    """Held-out evaluation; without a score, closeness to teacher or answers is what counts."""
    settings, budget = recipe.evaluation, recipe.training.token_budget
    queries = data.heldout[: settings.max_queries]
    seed = recipe.seed + _HELDOUT_SEED
    probes: dict[str, Probe] = {"base_logprob": BaseLogprob(policy, budget)}
    objective: Objective | None = None
    columns = recipe.algorithm.answer_columns[:1]
    if columns and queries:
        answers = [Group(q, (given_completion(policy, q, columns[0]),)) for q in queries]
        probes["target_logprob"] = TargetLogprob(policy, answers, budget)
        objective = Objective("target_logprob")
    if teacher is not None and queries:

        def write(prompt: Prompt) -> Sequence[Group]:
            engine.sync(prompt)
            return engine.generate(queries, 1, recipe.sampling, seed + 1)

        probes["teacher_kl"] = TeacherKL(policy, teacher, write, budget)
        objective = Objective("teacher_kl", -1.0)
    scored = any(reward.role == "score" for reward in recipe.rewards)
    return HeldoutEvaluator(
        engine,
        rewards,
        queries,
        recipe.sampling,
        completions_per_query=settings.completions_per_query,
        seed=seed,
        probes=probes,
        objective=None if scored else objective,
    )


def _reference(reference: Reference, prompt: Prompt) -> Prompt:
    if isinstance(reference, TextReference):
        return TextPrompt(reference.text)
    if isinstance(reference, InitialReference):
        return prompt.copy()
    return NonePrompt()
