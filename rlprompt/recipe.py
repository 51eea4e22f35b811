"""The recipe: one YAML that names a run in full, and the one place that builds its objects.

Errors name the YAML path and suggest the nearest key. Paths of data and rewards are relative to the
recipe's folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
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
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.rewards import build_rewards
from rlprompt.rewards.base import RewardSettings
from rlprompt.settings import Settings
from rlprompt.training.loop import RunParts, Trainer
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
        if self.algorithm.kl_coef == 0.0 and "reference" in self.model_fields_set:
            if not isinstance(self.reference, NoneReference):
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
                "sampling.temperature is 0, so all completions of a group would be the same; set it "
                "above 0"
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
        InputError: the file is not there or not YAML, or a key or value is wrong; the sentence names
            file and YAML path.
    """
    path = Path(path)
    tree = _read_yaml(path)
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe(**tree)
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error, tree)}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        )
        hint = f"did you mean '{path.parent / near[0]}'?" if near else "check the path"
        raise InputError(f"recipe '{path}' does not exist; {hint}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"recipe '{path}' is not valid YAML ({reason}); mend that line") from error
    if not isinstance(tree, dict):
        raise InputError(f"recipe '{path}' is not a mapping of keys; see `rlprompt schema`")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b.0.c=value` in the tree."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override '{override}' is not of the form key=value; write one")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override '{override}' has a value that is not YAML; quote it") from error
    *parents, last = key.strip().split(".")
    node: Any = tree
    for part in parents:
        node = _child(node, part, override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise InputError(f"override '{override}' goes below a plain value; check the key")


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    if isinstance(node, dict):
        return node.setdefault(part, {})
    raise InputError(f"override '{override}' goes below a plain value; check the key")


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise InputError(
            f"override '{override}': '{part}' is not an index of a list of {len(node)}; count from 0"
        )
    return int(part)


def _explain(error: ValidationError, tree: Mapping[str, Any]) -> str:
    """The first thing that pydantic found, as one sentence with its YAML path."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    place = _yaml_path(first["loc"])
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key '{place}'; {hint}{more}"
    if first["type"] == "missing":
        return f"'{place}' is missing; add it{more}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    given = "" if isinstance(first["input"], Mapping | BaseModel) else f", given {first['input']!r}"
    if first["type"] == "value_error":
        given = ""
    return f"'{place}': {message}{given}{more}" if place else f"{message}{more}"


def _yaml_path(location: Sequence[int | str]) -> str:
    """`rewards.0.weight`; the tags of tagged unions are left out."""
    tags = {"none", "initial", "text"}
    parts = [
        str(part)
        for i, part in enumerate(location)
        if not (i > 0 and location[i - 1] == "reference" and part in tags)
    ]
    return ".".join(parts)


def _known_keys(location: Sequence[int | str]) -> list[str]:
    """Field names of the settings class at a place in the tree."""
    schema = Recipe.model_json_schema()
    node: Mapping[str, Any] = schema
    for part in location:
        node = _resolved(node, schema)
        if isinstance(part, int):
            node = node.get("items", {})
        elif part in node.get("properties", {}):
            node = node["properties"][part]
        else:
            node = next(
                (
                    option
                    for option in (_resolved(o, schema) for o in node.get("oneOf", []))
                    if option["properties"]["type"].get("const") == part
                ),
                {},
            )
    return list(_resolved(node, schema).get("properties", {}))


def _resolved(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = node.get("$ref")
    if reference is None and len(node.get("allOf", [])) == 1:
        reference = node["allOf"][0].get("$ref")
    if reference is None:
        return node
    resolved: Mapping[str, Any] = schema["$defs"][reference.rsplit("/", 1)[-1]]
    return resolved


def build_trainer(
    recipe: Recipe, base_dir: Path, output: Path, console: Console | None = None
) -> Trainer:
    """Build every object that a recipe names.

    Cheap things come first, so that a wrong recipe fails before the model is loaded.

    Args:
        recipe: what to run.
        base_dir: the recipe's folder; data and reward paths are relative to it.
        output: the run folder.
        console: where the live display goes.

    Raises:
        InputError: anything named by the recipe cannot be had.
    """
    data = load_queries(recipe.data, base_dir)
    rewards = build_rewards(recipe.rewards, base_dir)
    trackers = build_trackers(recipe.tracking, console)
    policy = build_policy(recipe.model)
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

    Raises:
        InputError: see `load_base`, `ChatSlot.from_tokenizer` and `Policy`.
    """
    base = load_base(settings)
    return Policy(base, ChatSlot.from_tokenizer(base.tokenizer, settings.template))


def _reference(reference: Reference, prompt: SoftPrompt) -> Prompt:
    if isinstance(reference, TextReference):
        return TextPrompt(reference.text)
    if isinstance(reference, InitialReference):
        return SoftPrompt(prompt.embeddings, prompt.init_text)
    return NonePrompt()
