"""A recipe and the run folder that it is for: what the folder remembers, and what may change."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from rlprompt.recipe.schema import Recipe, with_new_settings
from rlprompt.recipe.yaml_file import read_tree
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


def check_folder(folder: Path, recipe: Recipe, resume: bool) -> list[str]:
    """Refuse a folder that the run of a recipe may not write to; reads only.

    Args:
        folder: the run folder, which need not exist.
        recipe: the recipe.
        resume: whether the run in the folder is to go on.

    Returns:
        Lines about what changes in the run that goes on.

    Raises:
        InputError: see `check_output` and `require_progress`.
    """
    plain = recipe.plain()
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
    return claim_output(folder, recipe.plain(), base_dir, resume, updated, keys)


def _updated(folder: Path, recipe: Recipe) -> Updated:
    stored_for = recipe_folder(folder / RECIPE_FILE)
    return partial(with_new_settings, kind=type(recipe), base_dir=stored_for)
