"""From a recipe to a run: the one place that builds every object that a recipe names."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from rlprompt.algorithms.base import Algorithm
from rlprompt.algorithms.constraints import Constraints
from rlprompt.algorithms.make import make_algorithm
from rlprompt.algorithms.robust import QueryWeights
from rlprompt.artifacts.format import load_artifact
from rlprompt.data import QuerySampler, load_queries
from rlprompt.data.augment import Augmenter
from rlprompt.data.base import QuerySplit, TestSettings
from rlprompt.distributed.ranks import Ranks
from rlprompt.distributed.shared_engine import SharedEngine
from rlprompt.endpoints.client import EndpointClient
from rlprompt.endpoints.ledger import Ledger
from rlprompt.engines.base import Engine
from rlprompt.engines.endpoint import EndpointEngine, EndpointEngineSettings, RemoteModel
from rlprompt.engines.make import make_engine, require_support
from rlprompt.errors import InputError
from rlprompt.evaluation.heldout import HeldoutEvaluator
from rlprompt.policy import Policy, require_policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.make import make_prompt
from rlprompt.prompts.settings import StartSettings
from rlprompt.prompts.text import NonePrompt, TextPrompt, TextSettings
from rlprompt.recipe.bases import check_renders, outline_of, policy_of
from rlprompt.recipe.endpoints import endpoints_of
from rlprompt.recipe.evaluators import evaluator_of, heldout_of
from rlprompt.recipe.lengths import fitting
from rlprompt.recipe.objects import Objects, in_memory
from rlprompt.recipe.paths import with_absolute_paths
from rlprompt.recipe.schema import (
    InitialReference,
    Recipe,
    Reference,
    TextReference,
    with_template_text,
)
from rlprompt.recipe.surroundings import surrounded_prompts
from rlprompt.reports.report import write_report
from rlprompt.rewards import RewardRunner, build_rewards
from rlprompt.rewards.base import RunPlan
from rlprompt.rollout.prefetch import PrefetchedSource
from rlprompt.rollout.sources import (
    ColumnSource,
    QuerySource,
    RolloutSource,
    Source,
)
from rlprompt.runs.guards import GuardWatch
from rlprompt.runs.learner import Learner
from rlprompt.runs.parts import RunParts
from rlprompt.runs.population import Population
from rlprompt.runs.run import Run
from rlprompt.search.base import SearchSettings, SearchStart
from rlprompt.search.make import make_searcher
from rlprompt.search.step import SearchParts, SearchStep
from rlprompt.serving.loaded import artifact_folder
from rlprompt.tracking.make import build_trackers
from rlprompt.tracking.tracker import TrackerGroup
from rlprompt.training.step import GradientStep, StepParts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shared:
    """What several runs on one base can share: nothing in it learns."""

    data: QuerySplit
    target: Policy | RemoteModel
    """The policy over the base, of which each run sets the prompt of its own; or a model behind an
    endpoint."""
    engine: Engine
    teacher: Prompt | None
    evaluator: HeldoutEvaluator
    test: HeldoutEvaluator | None
    """On the queries that choose nothing; None = there are none."""
    ranks: Ranks
    objects: Objects
    ledger: Ledger | None = None
    """What is asked of endpoints and may be spent; None = nothing is asked."""

    @property
    def policy(self) -> Policy:
        """The policy over the base.

        Raises:
            InputError: the model is behind an endpoint.
        """
        return require_policy(self.target)

    def scale(self, prompt: Prompt) -> float:
        """The scale of a prompt's parameters on the base; 1 where there is no base."""
        return prompt.scale(self.target) if isinstance(self.target, Policy) else 1.0

    def sibling(self) -> Shared:
        """The same for a further run, with a policy of its own."""
        target = self.target
        return replace(self, target=target.sibling() if isinstance(target, Policy) else target)


def build_run(
    recipe: Recipe,
    base_dir: Path,
    output: Path,
    console: Console | None = None,
    ranks: Ranks | None = None,
    objects: Objects | None = None,
) -> Run | Population:
    """The run of a recipe: one prompt, or a population on one loaded base.

    Arguments and errors as for `build_single_run`.
    """
    _require_rows(recipe, objects or Objects())
    if not recipe.population:
        return build_single_run(recipe, base_dir, output, console, ranks, objects)
    ranks, objects = ranks or Ranks(), objects or Objects()
    if ranks.size > 1:
        raise InputError(
            f"population trains its members one after the other on one rank, this run has "
            f"{ranks.size}; submit one job per member (rlprompt submit --sweep)"
        )
    recipe = with_template_text(recipe, base_dir)
    members = recipe.members()
    for member in members.values():
        _refuse_fixed(member)
    rewards = _rewards(recipe, base_dir, ranks, objects)
    data = _queries(recipe, base_dir, objects)
    members = {name: started_from_data(member, data) for name, member in members.items()}
    shared = _shared(recipe, data, rewards, ranks, objects, output)
    if not shared.data.heldout:
        raise InputError(
            "population needs held-out queries to choose the best prompt by (data.heldout is 0); "
            "set data.heldout"
        )
    runs = {}
    for name, member in members.items():
        own = shared.sibling()
        trackers = _trackers(member, console, ranks)
        parts = _parts(member, base_dir, own, _rewards(member, base_dir, ranks, objects), trackers)
        # Its folder lies elsewhere, and can be evaluated by its own stored recipe.
        stored = with_absolute_paths(parts.recipe, base_dir, classes=True)
        runs[name] = Run(replace(parts, recipe=stored), output / "members" / name)
    return Population(runs, output, recipe.evaluation.acceptance)


def build_single_run(
    recipe: Recipe,
    base_dir: Path,
    output: Path,
    console: Console | None = None,
    ranks: Ranks | None = None,
    objects: Objects | None = None,
) -> Run:
    """Build every object that a recipe names.

    Cheap things come first, so that a wrong recipe fails before the model is loaded.

    Args:
        recipe: what to run.
        base_dir: the recipe's folder; its paths are relative to it.
        output: the run folder.
        console: where the live display goes.
        ranks: the ranks among whom the work is divided; None when this process is alone.
        objects: what `memory:` paths of the recipe stand for.

    Raises:
        InputError: anything named by the recipe cannot be had.
    """
    _refuse_fixed(recipe)
    ranks, objects = ranks or Ranks(), objects or Objects()
    _refuse_overlap(recipe, ranks)
    recipe = with_template_text(recipe, base_dir)
    data = _queries(recipe, base_dir, objects)
    recipe = started_from_data(recipe, data)
    rewards = _rewards(recipe, base_dir, ranks, objects)
    trackers = _trackers(recipe, console, ranks)
    shared = _shared(recipe, data, rewards, ranks, objects, output)
    return Run(_parts(recipe, base_dir, shared, rewards, trackers), output)


def build_shared(recipe: Recipe, base_dir: Path, objects: Objects | None = None) -> Shared:
    """Data, base and held-out evaluation of a recipe, without a prompt.

    Raises:
        InputError: see `build_single_run`.
    """
    ranks, objects = Ranks(), objects or Objects()
    _require_rows(recipe, objects)
    recipe = with_template_text(recipe, base_dir)
    data = _queries(recipe, base_dir, objects)
    return _shared(recipe, data, _rewards(recipe, base_dir, ranks, objects), ranks, objects)


def _queries(recipe: Recipe, base_dir: Path, objects: Objects) -> QuerySplit:
    """The queries, with the answers that the algorithm learns from where it does."""
    answers = recipe.algorithm.answer_columns if recipe.search is None else ()
    return load_queries(recipe.data, base_dir, objects.rows, answers)


def started_from_data(recipe: Recipe, data: QuerySplit) -> Recipe:
    """The recipe with the data's system turn as `prompt.init_text`, where `data.system` says so.

    Raises:
        InputError: the recipe names another text to start from.
    """
    if data.system is None or not isinstance(recipe.prompt, StartSettings):
        return recipe
    fields = type(recipe.prompt).model_fields
    given = recipe.prompt.model_dump()
    if recipe.prompt.init_text not in (None, fields["init_text"].default, data.system):
        raise InputError(
            "prompt.init_text and data.system: init both say what the prompt starts from, and "
            "their texts differ; remove init_text, or set data.system: drop"
        )
    given["init_text"] = data.system
    prompt = type(recipe.prompt).model_validate(given)
    return recipe.model_copy(update={"prompt": prompt})


def _require_rows(recipe: Recipe, objects: Objects) -> None:
    """Refuse data that was in memory of another program."""
    data = recipe.data
    paths = {"path": data.path, "heldout_path": data.heldout_path}
    if isinstance(data.test, TestSettings):
        paths["test.path"] = data.test.path
    for key, path in paths.items():
        if path is not None and in_memory(path) and path not in objects.rows:
            raise InputError(
                f"data.{key} is '{path}', rows in memory of the program that began this run; name "
                "a file, or call rlprompt.train with data"
            )


def _refuse_fixed(recipe: Recipe) -> None:
    if recipe.search is None and not recipe.prompt.trains:
        raise InputError(
            f"prompt.type is {recipe.prompt.type}, which has nothing to train; evaluate it with "
            "`rlprompt eval`, or set prompt.type: soft and give the text as prompt.init_text"
        )


def _refuse_overlap(recipe: Recipe, ranks: Ranks) -> None:
    """Two threads that meet the other ranks could meet each other's partners."""
    if recipe.training.overlap_rollouts and ranks.size > 1:
        raise InputError(
            f"training.overlap_rollouts works on one rank, this run has {ranks.size}; remove it"
        )


def _rewards(recipe: Recipe, base_dir: Path, ranks: Ranks, objects: Objects) -> RewardRunner:
    needs_score = recipe.algorithm.needs_rewards
    return build_rewards(
        recipe.rewards, base_dir, needs_score=needs_score, given=objects.rewards, ranks=ranks
    )


def _plan(recipe: Recipe, data: QuerySplit) -> RunPlan:
    """What rewards see of the run ahead."""
    training = recipe.training
    queries = training.queries_per_step
    search = recipe.search
    if search is not None:
        copies = search.completions_per_query
    else:
        given = len(recipe.algorithm.answer_columns)
        copies = given or int(getattr(recipe.algorithm, "group_size", 1))
    return RunPlan(
        steps=training.steps,
        num_queries=len(data.train),
        queries_per_step=queries,
        completions_per_step=queries * copies,
        eval_steps=recipe.evaluation.every,
        save_steps=training.save_every,
    )


def _trackers(recipe: Recipe, console: Console | None, ranks: Ranks) -> TrackerGroup:
    return build_trackers(recipe.tracking, console) if ranks.is_first else TrackerGroup({})


def _shared(
    recipe: Recipe,
    data: QuerySplit,
    rewards: RewardRunner,
    ranks: Ranks,
    objects: Objects,
    output: Path | None = None,
) -> Shared:
    """Everything that does not learn.

    Args:
        recipe: the recipe.
        data: its queries.
        rewards: its rewards.
        ranks: the ranks of the run.
        objects: what is in memory.
        output: the run folder, where what was paid for is kept; None = in memory.
    """
    ledger = _ledger(recipe, output)
    if isinstance(recipe.engine, EndpointEngineSettings):
        return _shared_remote(recipe, recipe.engine, data, rewards, ranks, objects, ledger)
    data = fitting(data, recipe, outline_of(recipe, objects))
    policy = policy_of(recipe, objects)
    rewards.plan = _plan(recipe, data)
    rewards.bind_policy(policy)
    rewards.spread(ranks, base_is_shared=policy.base.shards is not None)
    policy.gradient_checkpointing = recipe.training.gradient_checkpointing
    check_renders(policy, data)
    teacher = _teacher(recipe)
    engine = make_engine(policy, recipe.engine)
    shards = policy.base.shards
    if shards is not None:
        whole = all(ranks.each(lambda: shards.rolls_out_whole, "the free memory"))
        around = partial(shards.rollout, whole)
        engine = SharedEngine(engine, ranks, together=not whole, around=around)
    elif ranks.size > 1:
        engine = SharedEngine(engine, ranks)
    require_support(engine, _fixed_prompts(recipe, teacher))
    evaluator, test = (
        evaluator_of(recipe, queries, policy, engine, rewards, teacher, ranks)
        for queries in (data.heldout, data.test)
    )
    tested = test if data.test else None
    return Shared(data, policy, engine, teacher, evaluator, tested, ranks, objects, ledger)


def _ledger(recipe: Recipe, output: Path | None) -> Ledger | None:
    """Journal and budget of a run that asks endpoints; a population has one."""
    asks = any(endpoints_of(each) for each in (recipe, *recipe.members().values()))
    return Ledger(recipe.budget, output) if asks else None


def _shared_remote(
    recipe: Recipe,
    settings: EndpointEngineSettings,
    data: QuerySplit,
    rewards: RewardRunner,
    ranks: Ranks,
    objects: Objects,
    ledger: Ledger | None,
) -> Shared:
    """The same where the model is behind an endpoint: no base is loaded, and none measured under.

    Raises:
        InputError: there are several ranks, a reward judges with the base, or the endpoint's
            settings cannot be used here.
    """
    if ranks.size > 1:
        raise InputError(
            f"engine.type is endpoint, which needs no ranks to divide work among, and this run has "
            f"{ranks.size}; start one process"
        )
    for name in rewards.judging_with_base:
        raise InputError(
            f"reward '{name}' judges with the run's own base, and with engine.type: endpoint none "
            "is here; set its option model, such as {path: smollm2-135m}"
        )
    rewards.plan = _plan(recipe, data)
    engine = EndpointEngine(settings, EndpointClient(settings, ledger))
    logger.info(
        "prompts are for %s: no base is loaded, and base_logprob and base_kl are not measured",
        engine.model.id,
    )
    evaluator, test = (
        heldout_of(recipe, queries, engine, rewards, {}, None)
        for queries in (data.heldout, data.test)
    )
    tested = test if data.test else None
    return Shared(data, engine.model, engine, None, evaluator, tested, ranks, objects, ledger)


def _parts(
    recipe: Recipe,
    base_dir: Path,
    shared: Shared,
    rewards: RewardRunner,
    trackers: TrackerGroup,
) -> RunParts:
    """What one run has of its own, on what it may share."""
    target, data = shared.target, shared.data
    rewards.plan = _plan(recipe, data)
    prompt = build_prompt(recipe, target, base_dir, shared.objects)
    if isinstance(target, Policy):
        rewards.bind_policy(target)
        target.prompt = prompt
    require_support(shared.engine, (prompt, *surrounded_prompts(recipe.augment, prompt)))
    learner: Learner
    if recipe.search is None:
        learner = _gradient_step(recipe, shared, rewards)
    else:
        learner = _search_step(recipe, recipe.search, shared, rewards, prompt)
    return RunParts(
        name=recipe.name,
        target=target,
        learner=learner,
        evaluator=shared.evaluator,
        test=shared.test,
        data=data,
        settings=recipe.training,
        evaluation=recipe.evaluation,
        sampling=recipe.sampling,
        trackers=trackers,
        seed=recipe.seed,
        recipe=recipe.plain(),
        write_report=write_report,
        ranks=shared.ranks,
        guards=GuardWatch(recipe.guards),
        ledger=shared.ledger,
    )


def _gradient_step(recipe: Recipe, shared: Shared, rewards: RewardRunner) -> GradientStep:
    policy = shared.policy
    max_tokens = recipe.sampling.max_tokens
    algorithm = make_algorithm(recipe.algorithm, policy, max_tokens, recipe.seed)
    needs_reference = recipe.algorithm.needs_reference
    return GradientStep(
        StepParts(
            policy=policy,
            algorithm=algorithm,
            source=_source(recipe, shared, rewards, algorithm),
            rewards=rewards,
            settings=recipe.training,
            probe=shared.data.train[0],
            learns_from_rewards=recipe.algorithm.needs_rewards,
            reference=_reference(recipe.reference, policy.prompt) if needs_reference else None,
            teacher=shared.teacher,
            constraints=_constraints(recipe, rewards),
            query_weights=_query_weights(recipe, shared.data),
            ranks=shared.ranks,
            importance_cap=recipe.engine.importance_weight_cap,
        )
    )


def _search_step(
    recipe: Recipe,
    settings: SearchSettings,
    shared: Shared,
    rewards: RewardRunner,
    prompt: Prompt,
) -> SearchStep:
    data = shared.data
    augment = Augmenter(recipe.augment, data.train) if recipe.augment else None
    start = SearchStart(
        prompt,
        recipe.seed,
        engine=shared.engine,
        queries=data.train,
        queries_per_step=recipe.training.queries_per_step,
        temperature=recipe.sampling.temperature,
        scale=shared.scale(prompt),
        ledger=shared.ledger,
    )
    return SearchStep(
        SearchParts(
            searcher=make_searcher(settings, start),
            engine=shared.engine,
            rewards=rewards,
            queries=QuerySource(data.train, _sampler(recipe, data), augment),
            sampling=recipe.sampling,
            completions_per_query=settings.completions_per_query,
            base=shared.target.id,
            max_calls=settings.max_calls,
        )
    )


def build_prompt(
    recipe: Recipe,
    target: Policy | RemoteModel,
    base_dir: Path,
    objects: Objects | None = None,
) -> Prompt:
    """The prompt of a recipe before training.

    Args:
        recipe: the recipe.
        target: the model that the prompt is for.
        base_dir: folder that paths in the recipe are relative to.
        objects: what is in memory.

    Raises:
        InputError: see `make_prompt`, and `load_artifact` for the artifact that it starts from.
    """
    if isinstance(recipe.prompt, TextSettings):
        return TextPrompt(recipe.prompt.text)
    policy = require_policy(target)
    known = {} if objects is None else objects.prompts

    def load(path: str) -> Prompt:
        if path in known:
            return known[path].copy()
        folder = artifact_folder(base_dir / path)
        return load_artifact(folder, policy, own=recipe.own_prompts.values())

    return make_prompt(recipe.prompt, policy, recipe.seed, load)


def _source(recipe: Recipe, shared: Shared, rewards: RewardRunner, algorithm: Algorithm) -> Source:
    """The source that the algorithm's settings name.

    Raises:
        InputError: the dataset is too small, or lacks the answers.
    """
    data, policy = shared.data, shared.policy
    sampler = _sampler(recipe, data)
    augment = Augmenter(recipe.augment, data.train) if recipe.augment else None
    columns = recipe.algorithm.answer_columns
    if columns:
        return ColumnSource(data.train, sampler, policy, columns, augment)
    prompt = policy.prompt
    if recipe.algorithm.draws_from_teacher:
        assert shared.teacher is not None
        prompt = shared.teacher
    overlaps = recipe.training.overlap_rollouts
    under = prompt.copy() if overlaps else prompt
    source = RolloutSource(
        data.train,
        sampler,
        shared.engine,
        under,
        rewards,
        algorithm,
        recipe.sampling,
        augment,
        is_trained=not recipe.algorithm.draws_from_teacher,
    )
    return PrefetchedSource(source, prompt, under) if overlaps else source


def _sampler(recipe: Recipe, data: QuerySplit) -> QuerySampler:
    """Which training queries are next.

    Raises:
        InputError: there are fewer than a step needs.
    """
    count, size = len(data.train), recipe.training.queries_per_step
    if size > count:
        raise InputError(
            f"training.queries_per_step is {size}, the dataset has {count} training queries; "
            "lower it or add queries"
        )
    return QuerySampler(count, size, recipe.seed)


def _fixed_prompts(recipe: Recipe, teacher: Prompt | None) -> list[Prompt]:
    """What completions are drawn under beside the prompt that is trained."""
    written = [recipe.evaluation.handwritten, *recipe.evaluation.texts]
    texts = [TextPrompt(text) for text in written if text is not None]
    return [NonePrompt(), *texts, *([] if teacher is None else [teacher])]


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


def _reference(reference: Reference, prompt: Prompt) -> Prompt:
    if isinstance(reference, TextReference):
        return TextPrompt(reference.text)
    if isinstance(reference, InitialReference):
        return prompt.copy()
    return NonePrompt()
