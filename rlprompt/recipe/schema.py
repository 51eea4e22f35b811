"""The recipe: one YAML that names a run in full.

Errors name the YAML path and suggest the nearest key. Paths of data, rewards and templates are
relative to the recipe's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from rlprompt.algorithms.constraints import ConstraintSettings
from rlprompt.algorithms.grpo import GRPOSettings
from rlprompt.algorithms.make import AnyAlgorithmSettings
from rlprompt.algorithms.robust import RobustSettings
from rlprompt.certify.succession import member_alpha
from rlprompt.data.augment import AugmentList
from rlprompt.data.base import DataSettings
from rlprompt.distributed.ranks import DistributedSettings
from rlprompt.endpoints.settings import BudgetSettings
from rlprompt.engines.make import AnyEngineSettings
from rlprompt.engines.native import NativeSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError, choices
from rlprompt.evaluation.heldout import EvaluationSettings
from rlprompt.model.base import ModelSettings
from rlprompt.model.chat.template import read_template
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.make import AnyPromptSettings, own_classes, prompt_class
from rlprompt.prompts.settings import StartSettings
from rlprompt.prompts.soft import SoftSettings
from rlprompt.reading import yaml_text
from rlprompt.recipe.endpoints import check_endpoints
from rlprompt.recipe.extensions import extended, load_named
from rlprompt.recipe.paths import with_absolute_paths
from rlprompt.recipe.secrets import secret_in
from rlprompt.recipe.surroundings import check_surroundings
from rlprompt.recipe.vllm import check_vllm
from rlprompt.recipe.yaml_file import apply_override, explain, read_tree, set_value
from rlprompt.rewards.base import RewardSettings
from rlprompt.runs.claim_folder import recipe_folder
from rlprompt.runs.guards import Guard, require_known_rewards
from rlprompt.runs.settings import MemberSettings, RunSettings
from rlprompt.search.make import AnySearchSettings, searcher_class
from rlprompt.settings import Name, Settings
from rlprompt.tracking.make import TrackersSettings
from rlprompt.training.settings import TrainingSettings


class NoneReference(Settings):
    """The base without a system message, the template's default included."""

    type: Literal["none"] = "none"
    """Reference policy."""


class InitialReference(Settings):
    """The prompt as it was before training."""

    type: Literal["initial"] = "initial"
    """Reference policy."""


class TextReference(Settings):
    """The base under a hand-written text."""

    type: Literal["text"] = "text"
    """Reference policy."""
    text: str
    """The system message."""


Reference = Annotated[NoneReference | InitialReference | TextReference, Field(discriminator="type")]


class Recipe(Settings):
    """One run in full."""

    name: Name
    """What this run is called in reports, artifacts and trackers."""
    model: ModelSettings = ModelSettings()
    """The frozen base."""
    prompt: AnyPromptSettings = SoftSettings()
    """The prompt that is trained; soft when it has no type."""
    algorithm: AnyAlgorithmSettings = GRPOSettings()
    """How it learns; by GRPO when it has no type."""
    search: AnySearchSettings | None = None
    """Find the prompt by trial, without gradients and so without `algorithm`; null = no search."""
    reference: Reference = NoneReference()
    """The policy that the KL is measured to."""
    engine: AnyEngineSettings = NativeSettings()
    """What draws completions."""
    budget: BudgetSettings | None = None
    """What may be spent on models behind endpoints (`engine`, `search.writer`), members of a
    population together; the run ends before a request that may not fit. Null = no limit."""
    sampling: SamplingSettings = SamplingSettings()
    """How completions are drawn, in training and in held-out evaluation."""
    data: DataSettings
    """Where the queries come from."""
    augment: AugmentList = ()
    """Situations that a share of the training queries is asked in, against a shift of the
    conversation; validation and test queries are asked as they are."""
    rewards: tuple[RewardSettings, ...] = ()
    """What is rewarded, and what is only watched. An algorithm that learns from rewards needs one
    with the role `score`."""
    constraints: ConstraintSettings = ConstraintSettings()
    """How multipliers of rewards with the role `constraint` are learned."""
    robust: RobustSettings | None = None
    """Learn for the worst queries; null = all queries count alike."""
    guards: tuple[Guard, ...] = ()
    """What watches the run for reward hacking."""
    training: TrainingSettings = TrainingSettings()
    """Steps, optimizer, checkpoints."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Held-out evaluation."""
    tracking: TrackersSettings = TrackersSettings()
    """Where the run reports to."""
    distributed: DistributedSettings = DistributedSettings()
    """How the run uses several ranks."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of everything drawn at random."""
    population: tuple[MemberSettings, ...] = Field(default=(), max_length=64)
    """Prompts that are trained one after the other on one loaded base, for a sweep over starts,
    learning rates or seeds. They share `training.steps`, `training.max_seconds` and
    `search.max_calls` evenly and meet the same held-out draws; the best one's artifact is the
    run's."""

    @model_validator(mode="after")
    def _can_ask_endpoints(self) -> Recipe:
        check_endpoints(self)
        return self

    @model_validator(mode="after")
    def _can_draw_on_vllm(self) -> Recipe:
        check_vllm(self)
        return self

    @model_validator(mode="after")
    def _can_be_searched(self) -> Recipe:
        if self.search is None:
            return self
        name = self.search.type
        kinds = searcher_class(self.search).starts_from
        if prompt_class(self.prompt).kind not in kinds:
            raise ValueError(
                f"search.type: {name} starts from a prompt of type {' or '.join(kinds)}, "
                f"prompt.type is {self.prompt.type}; set prompt.type: {kinds[0]}"
            )
        without_effect = self._of_gradients()
        if without_effect:
            raise ValueError(f"{without_effect[0]} has no effect with search; remove it")
        for reward in self.rewards:
            if reward.role == "constraint":
                raise ValueError(
                    f"reward '{reward.name}' has role: constraint, which a search cannot hold; "
                    "choose role: score, gate or metric"
                )
            if reward.normalise != "none":
                raise ValueError(
                    f"reward '{reward.name}' has normalise: {reward.normalise}, but a search "
                    "compares candidates by rewards as they are; remove it and set weight"
                )
        known = [reward.name for reward in self.rewards]
        for wanted in self.search.reward_names:
            if wanted not in known:
                raise ValueError(
                    f"search names the reward '{wanted}', which is not among rewards; "
                    f"{choices(wanted, known)}"
                )
        if self.sampling.temperature == 0.0 and self.search.completions_per_query > 1:
            raise ValueError(
                "sampling.temperature is 0, so all completions of a query would be the same; set "
                "it above 0, or search.completions_per_query: 1"
            )
        return self

    def _of_gradients(self) -> list[str]:
        """Keys that only gradients read and that are not at their defaults."""
        own = {name: getattr(self, name) for name in ("algorithm", "reference", "robust")}
        default = {name: type(self).model_fields[name].default for name in own}
        only = TrainingSettings.model_fields.keys() - RunSettings.model_fields.keys()
        for name in sorted(only - {"token_budget"}):  # held-out evaluation reads the budget too
            own[f"training.{name}"] = getattr(self.training, name)
            default[f"training.{name}"] = TrainingSettings.model_fields[name].default
        return [name for name, value in own.items() if value != default[name]]

    @model_validator(mode="after")
    def _settings_have_effect(self) -> Recipe:
        if not self.algorithm.needs_reference and not isinstance(self.reference, NoneReference):
            if "kl_coef" in type(self.algorithm).model_fields:
                why = "while algorithm.kl_coef is 0; set kl_coef or"
            else:
                why = f"with algorithm.type: {self.algorithm.type};"
            raise ValueError(f"reference has no effect {why} remove reference")
        scored = any(reward.role == "score" for reward in self.rewards)
        if self.algorithm.needs_rewards and not scored:
            raise ValueError(
                f"no reward has role: score, which {self.algorithm.type} learns from; add one to "
                "rewards"
            )
        held = any(reward.role == "constraint" for reward in self.rewards)
        if held and not self.algorithm.needs_rewards:
            raise ValueError(
                f"a reward has role: constraint, but {self.algorithm.type} does not learn from "
                "rewards; choose another algorithm, or role: metric"
            )
        if not held and self.constraints != ConstraintSettings():
            raise ValueError(
                "constraints has no effect without a reward of role: constraint; remove it"
            )
        require_known_rewards(self.guards, {each.name: each.role for each in self.rewards})
        chosen = self.evaluation.select_by
        if chosen != "reward" and chosen not in {each.name for each in self.rewards}:
            raise ValueError(
                f"evaluation.select_by names the reward '{chosen}', which the recipe does not "
                "have; write reward, or the name of one"
            )
        if self.evaluation.keep == "accepted" and self.data.heldout == 0:
            raise ValueError(
                "evaluation.keep: accepted has no effect with data.heldout: 0, which leaves no "
                "query to compare prompts on; hold some out, or remove keep"
            )
        if self.sampling.min_tokens > self.sampling.max_tokens:
            raise ValueError(
                f"sampling.min_tokens is {self.sampling.min_tokens}, max_tokens is "
                f"{self.sampling.max_tokens}; lower min_tokens"
            )
        groups = self.algorithm.needs_rewards and self.search is None
        if self.sampling.temperature == 0.0 and groups:
            raise ValueError(
                "sampling.temperature is 0, so all completions of a group would be the same; set "
                "it above 0"
            )
        return self

    @model_validator(mode="after")
    def _can_be_surrounded(self) -> Recipe:
        kind = prompt_class(self.prompt)
        check_surroundings(self.augment, kind, is_search=self.search is not None)
        return self

    @model_validator(mode="after")
    def _starts_from_one_text(self) -> Recipe:
        if self.data.system != "init":
            return self
        if not isinstance(self.prompt, StartSettings):
            raise ValueError(
                "data.system: init fills prompt.init_text, which a prompt of type "
                f"{self.prompt.type} does not have; set data.system: drop"
            )
        if self.prompt.from_artifact is not None:
            raise ValueError(
                "data.system: init and prompt.from_artifact both say what the prompt starts from; "
                "remove from_artifact, or set data.system: drop"
            )
        return self

    @model_validator(mode="after")
    def _can_overlap(self) -> Recipe:
        overlap = self.training.overlap_rollouts
        self.algorithm.check_ratio(prefetched=overlap)
        if not overlap:
            return self
        if not self.algorithm.has_ratio:
            raise ValueError(
                "training.overlap_rollouts makes batches one step old, and "
                f"{self.algorithm.type} has no probability ratio to correct for that; remove it, "
                "or choose grpo, rloo, reinforce or ppo"
            )
        if self.prompt.adapts_layers:
            raise ValueError(
                "training.overlap_rollouts needs a prompt that leaves the base's layers alone, "
                f"prompt.type is {self.prompt.type}; remove it, or choose soft, prefix or sequence"
            )
        if self.distributed.base == "sharded":
            raise ValueError(
                "training.overlap_rollouts needs the whole base on this rank, distributed.base is "
                "sharded; remove it"
            )
        return self

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Recipe:
        found = secret_in(self.plain())
        if found is not None:
            raise ValueError(f"'{found[0]}' {found[1]}")
        return self

    @model_validator(mode="after")
    def _members_are_recipes(self) -> Recipe:
        self.members()
        return self

    def members(self) -> dict[str, Recipe]:
        """The recipe of each member of the population, by name.

        Raises:
            ValueError: a change makes no recipe, or the steps cannot be shared evenly.
        """
        count = len(self.population)
        if count and self.training.steps % count:
            raise ValueError(
                f"training.steps is {self.training.steps}, which {count} members of population "
                "cannot share evenly; set a multiple"
            )
        calls = None if self.search is None else self.search.max_calls
        if count and calls is not None and calls % count:
            raise ValueError(
                f"search.max_calls is {calls}, which {count} members of population cannot share "
                "evenly; set a multiple"
            )
        names = [member.name for member in self.population]
        if len(set(names)) < count:
            raise ValueError("two members of population have the same name; rename one")
        return {member.name: self._member(member) for member in self.population}

    def _member(self, member: MemberSettings) -> Recipe:
        tree = self.plain() | {"name": f"{self.name}-{member.name}", "population": []}
        tree["training"]["steps"] //= len(self.population)
        if self.training.max_seconds is not None:
            tree["training"]["max_seconds"] /= len(self.population)
        if (accepted := self.evaluation.acceptance) is not None:
            share = member_alpha(accepted.alpha, len(self.population), accepted.against)
            tree["evaluation"]["evidence"] = accepted.model_dump(mode="json") | {"alpha": share}
        if self.search is not None and self.search.max_calls is not None:
            tree["search"]["max_calls"] //= len(self.population)
        for key, value in member.changes.items():
            set_value(tree, key, value, f"population member {member.name}")
        kind = type(self)  # with the classes of the user's own that the recipe names
        try:
            return kind.model_validate(tree)
        except ValidationError as error:
            _, sentence = explain(error, _json_schema(kind))
            raise ValueError(f"population member {member.name}: {sentence}") from error

    @property
    def own_prompts(self) -> dict[str, type[Prompt]]:
        """The representations of the user's own that the recipe names, by path."""
        named = [own_classes(recipe.prompt) for recipe in (self, *self.members().values())]
        return {path: found for classes in named for path, found in classes.items()}

    def plain(self) -> dict[str, Any]:
        """The resolved recipe as plain YAML values, every default spelled out."""
        return self.model_dump(mode="json")


def load_recipe(
    path: Path, overrides: Sequence[str] = (), remembered: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe; files that it names by a relative path have their absolute one in it.

    Args:
        path: a YAML file.
        overrides: `key.path=value` strings; values are parsed as YAML.
        remembered: values by dotted key that an earlier command set, before the overrides.

    Raises:
        InputError: the file is not there or not YAML, or a key or value is wrong; the sentence
            names file or override, and the YAML path. Also if the template cannot be read.
    """
    path = Path(path)
    tree = read_tree(path)
    for key, value in (remembered or {}).items():
        set_value(tree, key, value, f"'{key}', which the run was begun with,")
    for override in overrides:
        apply_override(tree, override)
    folder = recipe_folder(path)
    return recipe_of_tree(tree, folder, lambda place: _at_fault(path, overrides, place))


def recipe_of_tree(
    tree: Mapping[str, Any], base_dir: Path, at_fault: Callable[[str], str]
) -> Recipe:
    """A recipe of plain values.

    Args:
        tree: sections by key.
        base_dir: the folder that paths in it are relative to.
        at_fault: function from the YAML path of a wrong key or value to what wrote it, for the
            error message.

    Raises:
        InputError: a key or value is wrong, a path names no class that can stand there, or the
            template cannot be read.
    """
    tree = with_absolute_paths(tree, base_dir)
    kind = extended(Recipe, load_named(tree, base_dir, at_fault))
    try:
        recipe = kind.model_validate(tree)
    except ValidationError as error:
        place, sentence = explain(error, _json_schema(kind))
        raise InputError(f"{at_fault(place)}: {sentence}") from error
    return with_template_text(recipe, base_dir)


@lru_cache(maxsize=16)
def _json_schema(kind: type[Recipe]) -> dict[str, Any]:
    """The JSON schema of a recipe class, which takes longer to make than a recipe to read."""
    return kind.model_json_schema()


def _at_fault(path: Path, overrides: Sequence[str], place: str) -> str:
    """What to name in front of an error: the override that wrote `place`, else the file."""
    written = {override.partition("=")[0].strip(): override for override in overrides}
    inside = [o for key, o in written.items() if key.startswith(f"{place}.")]
    around = [o for key, o in written.items() if f"{place}.".startswith(f"{key}.")]
    if around:
        return f"override '{around[-1]}'"
    # An override of a key below makes the keys above it, unless the file has them.
    tree: Any = read_tree(path)
    for part in place.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return f"override '{inside[-1]}'" if inside and tree is None else str(path)


def with_template_text(recipe: Recipe, base_dir: Path) -> Recipe:
    """The recipe with a template's text in place of its path.

    Artifacts carry the recipe to places where the file is not, and a resumed run must find the
    template it began with.
    """
    if recipe.model.template is None:
        return recipe
    text = read_template(recipe.model.template, base_dir)
    model = recipe.model.model_copy(update={"template": text})
    return recipe.model_copy(update={"model": model})


def with_new_settings(
    stored: Any, kind: type[Recipe] = Recipe, base_dir: Path | None = None
) -> Any:
    """A stored recipe with the settings that a newer rlprompt has, at their defaults.

    Args:
        stored: the plain values of `recipe.resolved.yaml`; what is no recipe stays as it is.
        kind: class of the recipe that it is compared with. What is stored imports nothing: it can
            name only classes of the user's own that this recipe names too.
        base_dir: folder that relative paths in it are relative to; None = there are none.
    """
    values = stored
    if base_dir is not None and isinstance(stored, dict):
        values = with_absolute_paths(stored, base_dir)
    # Otherwise it is of a version that knew other keys, or no recipe at all.
    with suppress(ValidationError, InputError, yaml.YAMLError):
        plain = kind.model_validate(values).plain()
        values = yaml_text.load(yaml_text.dump(plain), 2 * yaml_text.MOST_NODES)
    if base_dir is None or not isinstance(values, dict):
        return values
    return with_absolute_paths(values, base_dir, classes=True)
