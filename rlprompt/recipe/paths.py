"""Paths in a recipe, made absolute: so that what a run stores can be run from where it lies.

A recipe names files relative to its own folder. The resolved recipe of a run and the one in an
artifact lie elsewhere, so a recipe is read with absolute paths wherever something is there; what is
not there (a hub id, a typing error) stays as it was written, for the part that reads it to judge.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlprompt.model.files.converted import is_converted
from rlprompt.model.files.fetch import EMBEDDED
from rlprompt.user_code import is_path

_FILES = (
    "data.path",
    "data.heldout_path",
    "data.test.path",
    "prompt.from_artifact",
    "prompt.parts.*.from_artifact",
    "search.components",
    "search.text_search.components",
)
"""Files and folders relative to the recipe's folder."""
_REWARDS = "rewards.*.path"
"""User code relative to the recipe's folder, then to the working directory."""
_CLASSES = (
    "algorithm.type",
    "prompt.type",
    "prompt.parts.*.type",
    "search.type",
    "engine.type",
    "tracking.trackers.*",
    "tracking.trackers.*.type",
)
"""Classes of the user's own, found in the same way."""
_FOLDERS = ("model.path", "distributed.nvme_path", "engine.adapter_folder")
"""Folders relative to the working directory."""
_MODELS = ("", "model.", "members.*.")
"""Where the options of a built-in reward name a model."""
_CA_FILES = (
    "rewards.*.options.ca_file",
    "engine.ca_file",
    "search.writer.ca_file",
    "search.text_search.writer.ca_file",
)
"""Files relative to the working directory."""


def with_absolute_paths(
    tree: Mapping[str, Any], base_dir: Path, *, classes: bool = False
) -> dict[str, Any]:
    """The plain values of a recipe with absolute paths in place of relative ones.

    Args:
        tree: sections by key, not checked yet: what has another form than a recipe's is passed
            over.
        base_dir: folder that paths in it are relative to.
        classes: whether that includes the classes of the user's own, which a recipe that was read
            knows by the path that it was given.
    """
    # A dataset that stands in the recipe is large, and no path is changed below the first level.
    made = {
        key: dict(value) if key == "data" and isinstance(value, dict) else copy.deepcopy(value)
        for key, value in tree.items()
    }
    for pattern in _FILES:
        _replace(made, pattern.split("."), lambda text: _found(text, base_dir))
    for pattern in (_REWARDS, *(_CLASSES if classes else ())):
        _replace(made, pattern.split("."), lambda text: _code(text, base_dir))
    for pattern in _FOLDERS:
        _replace(made, pattern.split("."), lambda text: _folder(text, Path.cwd()))
    for pattern in _CA_FILES:
        _replace(made, pattern.split("."), lambda text: _found(text, Path.cwd()))
    for place in _MODELS:
        options = f"rewards.*.options.{place}".split(".")[:-1]
        _replace(made, [*options, "path"], lambda text: _folder(text, base_dir))
        _replace(made, [*options, "template"], lambda text: _template(text, base_dir))
    _in_members(made, base_dir, classes)
    return made


def _in_members(tree: dict[str, Any], base_dir: Path, classes: bool) -> None:
    """The same in the changes of a population's members, whose keys are dotted or whole trees."""
    members = tree.get("population")
    for member in members if isinstance(members, list) else ():
        changes = member.get("changes") if isinstance(member, dict) else None
        if not isinstance(changes, dict):
            continue
        for key, value in changes.items():
            parts = str(key).split(".")
            nested: Any = value
            for part in reversed(parts):
                nested = {part: nested}
            nested = with_absolute_paths(nested, base_dir, classes=classes)
            for part in parts:
                nested = nested[part]
            changes[key] = nested


def _replace(node: Any, parts: list[str], change: Callable[[str], str]) -> None:
    """Change the texts at a pattern of keys, in place; `*` stands for every entry of a list."""
    first, rest = parts[0], parts[1:]
    keys: list[Any] = []
    if first == "*" and isinstance(node, list):
        keys = list(range(len(node)))
    elif first == "*" and isinstance(node, dict):
        keys = [key for key in node if str(key).isdecimal()]
    elif isinstance(node, dict) and first in node:
        keys = [first]
    for key in keys:
        if rest:
            _replace(node[key], rest, change)
        elif isinstance(node[key], str):
            node[key] = change(node[key])


def _found(text: str, base_dir: Path) -> str:
    """The absolute path of a file or folder, or the text where there is none."""
    try:
        path = base_dir / Path(text).expanduser()
        is_there = bool(text.strip()) and path.exists()
    except (OSError, ValueError, RuntimeError):  # a name that no file can have
        return text
    return _plain(path) if is_there else text


def _folder(text: str, base_dir: Path) -> str:
    if text in EMBEDDED or is_converted(text):  # such a name is no folder, whatever lies here
        return text
    found = _found(text, base_dir)
    return found if found == text or Path(found).is_dir() else text


def _template(text: str, base_dir: Path) -> str:
    # The other forms are a word, and Jinja itself.
    return _found(text, base_dir) if text.endswith(".jinja") else text


def _code(text: str, base_dir: Path) -> str:
    location, colon, name = text.rpartition(":")
    if not is_path(text) or not (location or name).endswith(".py"):
        return text
    file = location or name
    for place in (base_dir, Path.cwd()):
        found = _found(file, place)
        if found != file or Path(file).is_absolute():
            return f"{found}{colon}{name}" if location else found
    return text


def _plain(path: Path) -> str:
    """The absolute path without `..`; the name itself stays, though it be a link."""
    return str(path.parent.resolve() / path.name) if path.name else str(path.resolve())
