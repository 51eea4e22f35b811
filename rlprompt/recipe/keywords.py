"""From the keywords of `rlprompt.train` to a recipe, and the Python objects in its places."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlprompt.artifacts.format import read_artifact_info
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.make import PROMPTS
from rlprompt.recipe.objects import MEMORY, Objects, reward_name, rows_of, source_digest
from rlprompt.recipe.schema import Recipe, recipe_of_tree
from rlprompt.recipe.yaml_file import merge, read_tree
from rlprompt.serving.loaded import LoadedPrompt, artifact_folder

Start = str | Path | LoadedPrompt | Mapping[str, Any]
"""Where a prompt starts: a text, an artifact, a prompt in memory, or keys of a recipe's prompt."""

_TYPED = ("algorithm", "engine", "reference", "search")
"""Sections for which a text stands for their type."""
_QUERY_COLUMNS = ("query", "prompt")
"""Columns that hold the query when no other is named: ours, and TRL's."""
_START = f"{MEMORY}start"
_NO_FILE_NAME = "\n ?!"
"""Characters that a text has and the path of an artifact rarely."""


@dataclass(frozen=True)
class Keywords:
    """What `rlprompt.train` was given beside a recipe and a model; None = nothing."""

    rewards: Any
    data: Any
    heldout: Any
    test: Any
    prompt: Start | None
    sections: Mapping[str, Any]
    """Other keys of a recipe."""


def recipe_of(
    recipe: str | Path | Mapping[str, Any] | Recipe | None,
    keywords: Keywords,
    model: str | None,
    opened: Policy | None,
) -> tuple[Recipe, Path, Objects]:
    """The recipe that a call of `rlprompt.train` means.

    Args:
        recipe: path of a YAML file, its content, or None for keywords alone.
        keywords: what replaces its parts.
        model: name of the base; None = the recipe's, or the default.
        opened: a base in memory.

    Returns:
        The recipe, the folder that its paths are relative to, and the objects in its places.

    Raises:
        InputError: a key or a value is wrong; the sentence names the YAML path.
    """
    tree, base_dir, source = _tree(recipe)
    found = Found()
    typed = {
        key: {"type": value}
        for key, value in keywords.sections.items()
        if key in _TYPED and isinstance(value, str)
    }
    tree = merge(tree, {**keywords.sections, **typed})
    if keywords.rewards is not None:
        tree["rewards"] = reward_sections(keywords.rewards, found)
    if keywords.data is not None:
        tree["data"] = data_section(keywords.data, found)
    if keywords.heldout is not None:
        tree["data"] = {**tree.get("data", {}), **_heldout(keywords.heldout, found)}
    if keywords.test is not None:
        tree["data"] = {**tree.get("data", {}), "test": _test(keywords.test, found)}
    if keywords.prompt is not None:
        tree["prompt"] = _prompt(keywords.prompt, found, is_searched=bool(tree.get("search")))
        if isinstance(keywords.prompt, str) and tree["prompt"].keys() & {"init_text", "text"}:
            tree["evaluation"] = {"handwritten": keywords.prompt, **tree.get("evaluation", {})}
    if model is not None:
        tree["model"] = {**tree.get("model", {}), "path": model}
    if opened is not None:
        tree["model"] = {"path": f"{MEMORY}{opened.base.id}"}
    tree.setdefault("name", "run")
    objects = Objects(opened, found.rows, found.rewards, found.prompts)
    return recipe_of_tree(tree, base_dir, lambda _: source), base_dir, objects


@dataclass(frozen=True)
class Found:
    """Objects in memory, by the path that stands for them."""

    rows: dict[str, Sequence[Any]] = field(default_factory=dict)
    rewards: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    """Of the rewards."""


def _tree(
    recipe: str | Path | Mapping[str, Any] | Recipe | None,
) -> tuple[dict[str, Any], Path, str]:
    """The plain values of a recipe, the folder of its paths, and what errors call it."""
    if isinstance(recipe, str | Path):
        return read_tree(Path(recipe)), Path(recipe).parent, str(recipe)
    if isinstance(recipe, Recipe):
        return recipe.plain(), Path(), "the recipe"
    return copy.deepcopy(dict(recipe or {})), Path(), "rlprompt.train"


def reward_sections(rewards: Any, found: Found) -> list[Any]:
    """The entries of a recipe's `rewards` for what Python gives: one reward, or several."""
    several = isinstance(rewards, Sequence) and not isinstance(rewards, str)
    return [_reward(reward, found) for reward in (rewards if several else [rewards])]


def _reward(reward: Any, found: Found) -> Any:
    if isinstance(reward, Mapping):
        path = reward.get("path")
        if not callable(path):
            return dict(reward)
        entry = _in_memory(path, found)
        return {**entry, **reward, "path": entry["path"]}
    if isinstance(reward, str):
        return {"path": reward}
    if not callable(reward):
        raise InputError(
            f"rewards holds an object of type {type(reward).__name__}; give a function, a path "
            "such as file.py:object, or a mapping with path"
        )
    return _in_memory(reward, found)


def _in_memory(reward: Any, found: Found) -> dict[str, str]:
    """The entry of a reward that is a Python object: a path that stands for it, and its name."""
    name = reward_name(reward, found.names)
    path = f"{MEMORY}{name}{source_digest(reward)}"
    found.names.append(name)
    found.rewards[path] = reward
    return {"path": path, "name": name}


def data_section(data: Any, found: Found) -> dict[str, Any]:
    """The `data` of a recipe for what Python gives: rows in memory, a path, or keys of a recipe."""
    if isinstance(data, str | Path):
        return {"path": str(data)}
    if isinstance(data, Mapping) and {"path", "rows"} & data.keys():
        return dict(data)
    rows = rows_of(data, "data")
    path = f"{MEMORY}data"
    found.rows[path] = rows
    return {"path": path, "query_column": _query_column(rows)}


def _query_column(rows: Sequence[Any]) -> str:
    """The column of the queries: `query`, or TRL's `prompt` where there is no `query`."""
    first = rows[0] if rows else None
    names = [name for name in _QUERY_COLUMNS if isinstance(first, Mapping) and name in first]
    return names[0] if names else _QUERY_COLUMNS[0]


def _heldout(heldout: Any, found: Found) -> dict[str, Any]:
    if isinstance(heldout, int | float):
        return {"heldout": heldout}
    if isinstance(heldout, str | Path):
        return {"heldout_path": str(heldout)}
    path = f"{MEMORY}heldout"
    found.rows[path] = rows_of(heldout, "heldout")
    return {"heldout_path": path}


def _test(test: Any, found: Found) -> Any:
    """The `data.test` of a recipe for what Python gives: a count, a share, a file, or rows."""
    if isinstance(test, int | float):
        return test
    if isinstance(test, str | Path):
        return {"path": str(test)}
    if isinstance(test, Mapping) and test.keys() == {"path"}:
        return dict(test)
    path = f"{MEMORY}test"
    found.rows[path] = rows_of(test, "test")
    return {"path": path}


def _prompt(prompt: Start, found: Found, *, is_searched: bool) -> dict[str, Any]:
    if isinstance(prompt, Mapping):
        return dict(prompt)
    if isinstance(prompt, LoadedPrompt):
        if prompt.kind == "text":
            return _text(prompt.text, is_searched)
        found.prompts[_START] = prompt.prompt
        return {"type": _built_in(prompt.kind), "from_artifact": _START}
    folder = artifact_folder(prompt)
    if isinstance(prompt, Path) or (folder / "prompt.json").is_file():
        kind = read_artifact_info(folder).representation
        return {"type": _built_in(kind), "from_artifact": str(folder.absolute())}
    if not any(char in prompt for char in _NO_FILE_NAME) and ("/" in prompt or "\\" in prompt):
        raise InputError(
            f"prompt is '{prompt}', which looks like a path, but there is no artifact; correct "
            "it, or write a text with spaces"
        )
    return _text(prompt, is_searched)


def _text(text: str, is_searched: bool) -> dict[str, Any]:
    """The start at a text: a search begins with the text itself, gradients with its embeddings."""
    if is_searched:
        return {"type": "text", "text": text}
    return {"type": "soft", "init_text": text, "num_virtual_tokens": None}


def _built_in(kind: str) -> str:
    """The `prompt.type` of a representation that is built in."""
    if kind not in PROMPTS:
        raise InputError(
            f"prompt is of the kind '{kind}', which is not built in; name its class, as "
            "prompt={'type': 'path/file.py:object', 'from_artifact': ...}"
        )
    return kind
