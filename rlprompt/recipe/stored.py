"""A recipe and the run folder that it is for: what the folder remembers, and what may change."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from rlprompt.artifacts.format import read_artifact_info
from rlprompt.errors import InputError
from rlprompt.recipe.extensions import named_places
from rlprompt.recipe.paths import with_absolute_paths
from rlprompt.recipe.schema import Recipe, recipe_of_tree, with_new_settings
from rlprompt.recipe.yaml_file import apply_override, read_tree
from rlprompt.rewards import BUILTIN
from rlprompt.runs.changes import require_progress
from rlprompt.runs.checkpoint import read_progress
from rlprompt.runs.claim_folder import (
    RECIPE_FILE,
    Updated,
    check_output,
    claim_output,
    overridden_keys,
    recipe_folder,
    told,
)
from rlprompt.runs.guards import GuardWatch

_GONE = object()


def remembered(folder: Path) -> dict[str, Any]:
    """What was set beside the recipe's file when the run in a folder was begun or resumed.

    Args:
        folder: the run folder; one without a run remembers nothing.

    Returns:
        The values that the run has, by dotted key.

    Raises:
        InputError: the stored recipe cannot be read.
    """
    keys = overridden_keys(folder)
    tree = read_tree(folder / RECIPE_FILE) if keys else {}
    values = {key: _value_at(tree, key) for key in keys}
    return {key: value for key, value in values.items() if value is not _GONE}


def _value_at(tree: Any, key: str) -> Any:
    node = tree
    for part in key.split("."):
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return _GONE
    return node


def carried_recipe(artifact: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that an artifact carries.

    An artifact may come from a stranger: code, models and servers that its recipe names are not
    used unless the overrides name them.

    Args:
        artifact: the artifact's folder.
        overrides: `key.path=value` strings.

    Raises:
        InputError: there is no artifact or no recipe in it, the recipe is of another version, or
            it names what is not taken from an artifact alone.
    """
    info, path = read_artifact_info(artifact), artifact / "prompt.json"
    if not info.recipe:
        raise InputError(f"'{path}' carries no recipe; name one with --recipe")
    tree = copy.deepcopy(info.recipe)
    for override in overrides:
        apply_override(tree, override)
    for key, value in foreign_parts(info.recipe).items():
        if _value_at(tree, key) == value:
            raise InputError(
                f"the recipe in '{path}' names {key}: {value}, which an artifact alone does not "
                "run; name the recipe with --recipe, or evaluate it in the folder of its run"
            )
    return recipe_of_tree(tree, Path(), lambda _: f"the recipe in '{path}'")


def foreign_parts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe names that can run code, reach a server or send it secrets, by dotted key."""
    found: dict[str, Any] = {}
    rewards = tree.get("rewards")
    for place, reward in enumerate(rewards if isinstance(rewards, list) else ()):
        path = reward.get("path") if isinstance(reward, dict) else None
        kind, _, name = str(path).partition(":")
        if not (kind == "trl" or (kind == "builtin" and name in BUILTIN)):
            found[f"rewards.{place}.path"] = path
    found |= named_places(tree)
    search = tree.get("search")
    asked = {"engine": tree.get("engine")}
    asked["search.writer"] = search.get("writer") if isinstance(search, dict) else None
    for section, settings in asked.items():
        if isinstance(settings, dict) and settings.get("base_url") is not None:
            found[f"{section}.base_url"] = settings["base_url"]
    for key in ("urls", "adapter_folder"):
        if isinstance(engine := tree.get("engine"), dict) and engine.get(key) is not None:
            found[f"engine.{key}"] = engine[key]
    model = tree.get("model")
    if isinstance(model, dict) and model.get("trust_remote_code"):
        found["model.trust_remote_code"] = True
    return found


def check_folder(folder: Path, recipe: Recipe, base_dir: Path, resume: bool) -> list[str]:
    """Refuse a folder that the run of a recipe may not write to; reads only.

    Args:
        folder: the run folder, which need not exist.
        recipe: the recipe.
        base_dir: folder that its relative paths are relative to.
        resume: whether the run in the folder is to go on.

    Returns:
        Lines about what changes in the run that goes on.

    Raises:
        InputError: see `check_output` and `require_progress`.
    """
    plain = with_absolute_paths(recipe.plain(), base_dir, classes=True)
    changes = check_output(folder, plain, resume, _updated(folder, recipe))
    progress = read_progress(folder / "checkpoints") if changes else None
    if progress is not None:
        require_progress(progress, changes, recipe.training, GuardWatch(recipe.guards))
    return told(changes, plain)


def claim_folder(
    folder: Path, recipe: Recipe, base_dir: Path, resume: bool, overridden: Sequence[str] = ()
) -> AbstractContextManager[bool]:
    """Hold a run folder for the run of a recipe; see `claim_output`.

    Args:
        folder: the run folder.
        recipe: the recipe.
        base_dir: folder that its relative paths are relative to.
        resume: whether the run in the folder is to go on.
        overridden: dotted keys that were set beside the recipe's file.
    """
    updated = _updated(folder, recipe)
    keys = [*overridden_keys(folder), *overridden] if resume else overridden
    plain = with_absolute_paths(recipe.plain(), base_dir, classes=True)
    return claim_output(folder, plain, base_dir, resume, updated, keys)


def _updated(folder: Path, recipe: Recipe) -> Updated:
    stored_for = recipe_folder(folder / RECIPE_FILE)
    return partial(with_new_settings, kind=type(recipe), base_dir=stored_for)
