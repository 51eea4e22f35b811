"""The recipe: one YAML that names a run in full, and the one place that builds its objects.

Errors name the YAML path and suggest the nearest key. Paths of data, rewards and templates are
relative to the recipe's folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from rich.console import Console

from rlprompt.algorithms.grpo import GRPO, GRPOSettings
from rlprompt.data import load_queries
from rlprompt.data.base import DataSettings
from rlprompt.engines.native import NativeEngine, NativeSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.evaluation.heldout import EvaluationSettings
from rlprompt.model.base import ModelSettings, load_base
from rlprompt.model.slot import ChatSlot
from rlprompt.model.template import read_template
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.recipe_file import apply_override, explain, read_tree
from rlprompt.rewards import build_rewards
from rlprompt.rewards.base import RewardSettings
from rlprompt.rewards.combine import require_constraint_support
from rlprompt.settings import Settings
from rlprompt.training.loop import Trainer
from rlprompt.training.parts import RunParts
from rlprompt.training.settings import TrainingSettings
from rlprompt.training.tracking import TrackingSettings, build_trackers


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

    name: str = Field(min_length=1)
    """What this run is called in reports, artifacts and trackers."""
    model: ModelSettings = ModelSettings()
    """The frozen base."""
    prompt: SoftSettings = SoftSettings()
    """The prompt that is trained."""
    algorithm: GRPOSettings = GRPOSettings()
    """How it learns."""
    reference: Reference = NoneReference()
    """The policy that the KL is measured to."""
    engine: NativeSettings = NativeSettings()
    """What draws completions."""
    sampling: SamplingSettings = SamplingSettings()
    """How completions are drawn, in training and in held-out evaluation."""
    data: DataSettings
    """Where the queries come from."""
    rewards: tuple[RewardSettings, ...] = Field(min_length=1)
    """What is rewarded, and what is only watched."""
    training: TrainingSettings = TrainingSettings()
    """Steps, optimizer, checkpoints."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Held-out evaluation."""
    tracking: TrackingSettings = TrackingSettings()
    """Where the run reports to."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of everything drawn at random."""

    @model_validator(mode="after")
    def _settings_have_effect(self) -> Recipe:
        if self.algorithm.kl_coef == 0.0 and not isinstance(self.reference, NoneReference):
            raise ValueError(
                "reference has no effect while algorithm.kl_coef is 0; set kl_coef or remove "
                "reference"
            )
        if self.sampling.min_tokens > self.sampling.max_tokens:
            raise ValueError(
                f"sampling.min_tokens is {self.sampling.min_tokens}, max_tokens is "
                f"{self.sampling.max_tokens}; lower min_tokens"
            )
        if self.sampling.temperature == 0.0:
            raise ValueError(
                "sampling.temperature is 0, so all completions of a group would be the same; set "
                "it above 0"
            )
        return self

    def plain(self) -> dict[str, Any]:
        """The resolved recipe as plain YAML values, every default spelled out."""
        return self.model_dump(mode="json")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `key.path=value` strings; values are parsed as YAML.

    Raises:
        InputError: the file is not there or not YAML, or a key or value is wrong; the sentence
            names file or override, and the YAML path. Also if the template cannot be read.
    """
    path = Path(path)
    tree = read_tree(path)
    for override in overrides:
        apply_override(tree, override)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        place, sentence = explain(error, Recipe.model_json_schema())
        raise InputError(f"{_at_fault(path, overrides, place)}: {sentence}") from error
    return _with_template_text(recipe, path.parent)


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
    recipe = _with_template_text(recipe, base_dir)
    require_constraint_support(recipe.rewards, recipe.algorithm.type)
    data = load_queries(recipe.data, base_dir)
    rewards = build_rewards(recipe.rewards, base_dir)
    trackers = build_trackers(recipe.tracking, console)
    policy = build_policy(recipe.model)
    rewards.bind_policy(policy)
    policy.prompt = SoftPrompt.create(recipe.prompt, policy, recipe.seed)
    policy.gradient_checkpointing = recipe.training.gradient_checkpointing
    algorithm = GRPO(recipe.algorithm, recipe.sampling.max_tokens)
    reference = _reference(recipe.reference, policy.prompt) if algorithm.needs_reference else None
    parts = RunParts(
        name=recipe.name,
        policy=policy,
        engine=NativeEngine(policy, recipe.engine),
        algorithm=algorithm,
        reference=reference,
        rewards=rewards,
        data=data,
        sampling=recipe.sampling,
        training=recipe.training,
        evaluation=recipe.evaluation,
        trackers=trackers,
        seed=recipe.seed,
        recipe=recipe.plain(),
    )
    return Trainer(parts, output)


def build_policy(settings: ModelSettings) -> Policy:
    """A base with its chat slot, and no prompt yet.

    A template's path in these settings is relative to the working directory.

    Raises:
        InputError: see `load_base`, `ChatSlot.from_tokenizer` and `Policy`.
    """
    base = load_base(settings)
    return Policy(base, ChatSlot.from_tokenizer(base.tokenizer, settings.template))


def _with_template_text(recipe: Recipe, base_dir: Path) -> Recipe:
    """The recipe with a template's text in place of its path.

    Artifacts carry the recipe to places where the file is not, and a resumed run must find the
    template it began with.
    """
    if recipe.model.template is None:
        return recipe
    text = read_template(recipe.model.template, base_dir)
    model = recipe.model.model_copy(update={"template": text})
    return recipe.model_copy(update={"model": model})


def _reference(reference: Reference, prompt: SoftPrompt) -> Prompt:
    if isinstance(reference, TextReference):
        return TextPrompt(reference.text)
    if isinstance(reference, InitialReference):
        return SoftPrompt(prompt.embeddings, prompt.init_text)
    return NonePrompt()
