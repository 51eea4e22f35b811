"""From an artifact, or a recipe, to what a suite is run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlprompt.artifacts.format import load_artifact, read_artifact_info
from rlprompt.data import load_queries
from rlprompt.data.base import DataSettings, QuerySplit
from rlprompt.engines.base import Engine
from rlprompt.engines.endpoint import EndpointEngineSettings
from rlprompt.engines.make import make_engine, require_support
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.model.base import ModelSettings
from rlprompt.policy import Policy, open_policy
from rlprompt.prompts.base import Prompt
from rlprompt.recipe.bases import policy_of
from rlprompt.recipe.build import build_prompt, started_from_data
from rlprompt.recipe.objects import Objects
from rlprompt.recipe.schema import Recipe, load_recipe, with_template_text
from rlprompt.recipe.stored import carried_recipe
from rlprompt.rewards import RewardSettings, build_rewards
from rlprompt.runs.claim_folder import RECIPE_FILE, recipe_folder
from rlprompt.serving.loaded import base_of_artifact, checked_sampling, recipe_section
from rlprompt.suites.cells import reward_sources
from rlprompt.suites.evaluate import Ground
from rlprompt.suites.schema import SuiteSettings
from rlprompt.types import Query


@dataclass(frozen=True)
class Subject:
    """A prompt, and what it is evaluated on."""

    name: str
    prompt: Prompt
    ground: Ground
    recipe: str | None
    """Name of the recipe whose queries or rewards are used; None = the suite brings its own."""


@dataclass
class Bases:
    """The base that was loaded last, so that artifacts of one base share it."""

    _kept: dict[str, Policy] = field(default_factory=dict)

    def of_settings(self, settings: ModelSettings) -> Policy:
        """The policy over a base.

        Args:
            settings: the base.

        Raises:
            InputError: it cannot be loaded.
        """
        return self._policy(settings.model_dump_json(), lambda: open_policy(settings))

    def of_recipe(self, recipe: Recipe) -> Policy:
        """The policy over a recipe's base.

        Args:
            recipe: the recipe.

        Raises:
            InputError: it cannot be loaded.
        """
        key = recipe.model.model_dump_json() + recipe.distributed.model_dump_json()
        return self._policy(key, lambda: policy_of(recipe, Objects()))

    def _policy(self, key: str, load: Callable[[], Policy]) -> Policy:
        if key not in self._kept:
            self._kept.clear()
            self._kept[key] = load()
        return self._kept[key].sibling()


@dataclass(frozen=True)
class Asked:
    """What a user asks to be evaluated, and how."""

    artifact: Path | None
    """Folder of an artifact; None = the recipe's prompt as it is before training."""
    recipe: Path | None
    """Recipe in place of the artifact's own."""
    overrides: Sequence[str]
    """`key.path=value` strings for the recipe."""
    force: bool
    """Whether an artifact of another base is loaded."""


def prepare(asked: Asked, suite: SuiteSettings, suite_dir: Path, bases: Bases) -> Subject:
    """Load the prompt and all that the suite needs beside it.

    Args:
        asked: what is to be evaluated.
        suite: the suite.
        suite_dir: folder that paths in the suite are relative to.
        bases: bases that are loaded.

    Raises:
        InputError: something named is not there or wrong.
    """
    is_whole = suite.data is not None and suite.rewards is not None
    if is_whole and asked.recipe is None and asked.artifact is not None:
        if asked.overrides:
            raise InputError(
                f"'{asked.overrides[0]}' changes a recipe, and the suite brings data and rewards "
                "of its own; remove it"
            )
        return _by_suite(asked.artifact, asked.force, suite, suite_dir, bases)
    recipe, base_dir = recipe_of(asked.artifact, asked.recipe, asked.overrides)
    if isinstance(recipe.engine, EndpointEngineSettings):
        raise InputError(
            "engine.type is endpoint, and a suite looks into the base; evaluate rewards alone "
            "without --suite, or name a recipe with a base of your own"
        )
    recipe = with_template_text(recipe, base_dir)
    policy = bases.of_recipe(recipe)
    answers = recipe.algorithm.answer_columns if recipe.search is None else ()
    data = None if suite.data is not None else load_queries(recipe.data, base_dir, None, answers)
    prompt: Prompt
    if asked.artifact is None:
        start = recipe if data is None else started_from_data(recipe, data)
        prompt, name = build_prompt(start, policy, base_dir), recipe.name
    else:
        own = recipe.own_prompts.values()
        prompt = load_artifact(asked.artifact, policy, force=asked.force, own=own)
        name = read_artifact_info(asked.artifact).name
    queries = _suite_queries(suite.data, suite_dir) if data is None else _split(data, suite)
    rewards, reward_dir = (
        (recipe.rewards, base_dir) if suite.rewards is None else (suite.rewards, suite_dir)
    )
    given = [recipe.evaluation.handwritten, *recipe.evaluation.texts]
    written = [text for text in dict.fromkeys(given) if text is not None]
    engine = make_engine(policy, recipe.engine)
    require_support(engine, (prompt,))
    sampling = recipe.sampling
    ground = _ground(policy, engine, list(rewards), reward_dir, queries, sampling, written, suite)
    return Subject(name, prompt, ground, recipe.name)


def recipe_of(
    artifact: Path | None, recipe_path: Path | None, overrides: Sequence[str]
) -> tuple[Recipe, Path]:
    """The recipe to evaluate by, and the folder that its paths are relative to.

    Args:
        artifact: folder of an artifact; None = there is none.
        recipe_path: a YAML file; None = the recipe of the artifact's run, or the one it carries.
        overrides: `key.path=value` strings.

    Raises:
        InputError: neither is named, or the recipe is wrong.
    """
    if recipe_path is None and artifact is None:
        raise InputError(
            "there is nothing to evaluate; name an artifact or the folder of a run, or a recipe "
            "with --recipe"
        )
    if recipe_path is None and artifact is not None:
        if not (artifact.parent / RECIPE_FILE).is_file():
            return carried_recipe(artifact, overrides), Path()
        recipe_path = artifact.parent / RECIPE_FILE
    assert recipe_path is not None
    return load_recipe(recipe_path, overrides), recipe_folder(recipe_path)


def _by_suite(
    artifact: Path, force: bool, suite: SuiteSettings, suite_dir: Path, bases: Bases
) -> Subject:
    """An artifact on its base with queries and rewards of the suite; its recipe runs nothing."""
    info = read_artifact_info(artifact)
    policy = bases.of_settings(base_of_artifact(info, artifact, None, False))
    prompt = load_artifact(artifact, policy, force=force)
    sampling = checked_sampling(recipe_section(info, "sampling"))
    engine = make_engine(policy)
    require_support(engine, (prompt,))
    queries = _suite_queries(suite.data, suite_dir)
    rewards = list(suite.rewards or ())
    ground = _ground(policy, engine, rewards, suite_dir, queries, sampling, [], suite)
    return Subject(info.name, prompt, ground, None)


def _suite_queries(data: DataSettings | None, suite_dir: Path) -> list[Query]:
    """All queries that a suite brings, in the order of their hash."""
    assert data is not None
    split = load_queries(data, suite_dir)
    return [*split.train, *split.heldout, *split.test]


def _split(data: QuerySplit, suite: SuiteSettings) -> list[Query]:
    """The queries of the recipe that the suite asks for.

    Raises:
        InputError: there are none.
    """
    if suite.split == "test" or (suite.split == "auto" and data.test):
        found = data.test
    else:
        found = data.heldout
    if len(found) < 2:
        which = "test" if suite.split == "test" else "validation or test"
        raise InputError(
            f"the recipe holds {len(found)} {which} queries out, and a suite needs two at least; "
            "set data.heldout or data.test, or give the suite data of its own"
        )
    return list(found)


def _ground(
    policy: Policy,
    engine: Engine,
    rewards: list[RewardSettings],
    reward_dir: Path,
    queries: list[Query],
    sampling: SamplingSettings,
    written: list[str],
    suite: SuiteSettings,
) -> Ground:
    runner = build_rewards(rewards, reward_dir, needs_score=False)
    runner.bind_policy(policy)
    longest = min(sampling.max_tokens, suite.max_tokens or sampling.max_tokens)
    shortest = min(sampling.min_tokens, longest)
    drawn = sampling.model_copy(update={"max_tokens": longest, "min_tokens": shortest})
    chosen = queries[: suite.queries]
    for query in chosen:
        policy.slot.check(query.messages)
    sources = reward_sources(rewards, reward_dir)
    key = [[each.model_dump(mode="json"), s] for each, s in zip(rewards, sources, strict=True)]
    return Ground(policy, engine, runner, chosen, drawn, written, key)
