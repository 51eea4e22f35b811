"""A first recipe with its data and reward, for one of four targets, written into a folder.

The files are those of the repository (`recipes/`, `reward_models/`), which lie beside the package
in a checkout and travel inside it in a wheel. The recipe is written with paths of the new folder,
and with the description of each key above it.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprompt.errors import InputError, choices
from rlprompt.recipe.schema import Recipe, load_recipe
from rlprompt.settings import Settings

RECIPE_NAME, DATA_NAME, REWARD_NAME = "recipe.yaml", "example_queries.jsonl", "reward.py"
"""Files that are written."""

_PACKAGED = Path(__file__).parent / "starters"
_CHECKOUT = Path(__file__).parents[2]
_WIDTH = 96


@dataclass(frozen=True)
class Starter:
    """Where the files of a target come from, below the root of the repository."""

    recipe: str
    data: str
    reward: str


STARTERS: Mapping[str, Starter] = {
    "persona": Starter(
        "recipes/persona/smollm2_grpo.yaml",
        "recipes/data/everyday.jsonl",
        "reward_models/persona_pirate.py",
    ),
    "style": Starter(
        "recipes/concise/smollm2_grpo.yaml",
        "recipes/data/everyday.jsonl",
        "reward_models/concise.py",
    ),
    "safety": Starter(
        "recipes/safety/smollm2_grpo.yaml",
        "recipes/data/safety.jsonl",
        "reward_models/safety_posture.py",
    ),
    "task": Starter(
        "recipes/topics/smollm2_grpo.yaml",
        "recipes/data/topics.jsonl",
        "reward_models/topic_label.py",
    ),
}
"""By target. `pyproject.toml` puts these files into the wheel."""

_ADVICE = {
    ("data", "path"): (
        "EXAMPLES, to be replaced by queries of your own: the column `query` is what users ask, "
        "`split` says where a row belongs, and all other columns are handed to the reward "
        "(docs/data.md)."
    ),
    ("rewards", "path"): (
        f"The reward to learn from: edit {REWARD_NAME}, then try it with `rlprompt reward check`."
    ),
    ("prompt", "init_text"): "The text to start from; write what you would write by hand.",
    ("evaluation", "handwritten"): "What the learned prompt is compared with.",
}
"""Comments of this folder, by section and key; other keys have their descriptions."""


def starter_files(target: str, folder: Path) -> dict[Path, str]:
    """The files of a target by the path that they are to have.

    Args:
        target: a key of `STARTERS`.
        folder: the folder that they are to lie in, after which the run is named.

    Raises:
        InputError: there is no such target.
    """
    if target not in STARTERS:
        raise InputError(f"there is no target '{target}'; {choices(target, STARTERS)}")
    starter = STARTERS[target]
    reward = packaged_file(starter.reward).read_text(encoding="utf-8")
    name = Path(starter.reward).name
    return {
        folder / RECIPE_NAME: _recipe(target, starter, folder),
        folder / DATA_NAME: packaged_file(starter.data).read_text(encoding="utf-8"),
        folder / REWARD_NAME: reward.replace(f"../reward_models/{name}", REWARD_NAME),
    }


def write_starter(target: str, folder: Path) -> list[Path]:
    """Write the files of a target; all of them, or nothing.

    Args:
        target: a key of `STARTERS`.
        folder: the folder, which is made where it is not there.

    Returns:
        The paths of the files.

    Raises:
        InputError: there is no such target, one of the files is there already, or the folder cannot
            be written to.
    """
    files = starter_files(target, folder)
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            if any(_is_there(other) for other in files if other not in written):
                raise FileExistsError
            with path.open("x", encoding="utf-8", newline="\n") as file:
                written.append(path)
                file.write(text)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise InputError(_not_written(folder, files, error)) from error
    return written


def _not_written(folder: Path, files: Mapping[Path, str], error: OSError) -> str:
    if os.path.isfile(folder):
        return f"'{folder}' is a file; name a folder"
    there = [path for path in files if _is_there(path)]
    if there:
        return f"'{there[0]}' is there already and was left as it is; name another folder"
    return f"'{folder}' cannot be written to ({error.strerror}); name another folder"


def _is_there(path: Path) -> bool:
    """Whether a name is taken, by a link that leads nowhere too."""
    return os.path.lexists(path)


def packaged_file(path: str) -> Path:
    """Where a file of the repository is that travels with the package.

    Args:
        path: path below the root of the repository, one that `STARTERS` names.
    """
    packaged = _PACKAGED / path
    return packaged if packaged.is_file() else _CHECKOUT / path


def _recipe(target: str, starter: Starter, folder: Path) -> str:
    """The recipe of the repository with the paths of the new folder, its name, and comments."""
    source = packaged_file(starter.recipe)
    text = source.read_text(encoding="utf-8")
    about = text.partition("\n")[0]
    body = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    for old, new in ((starter.data, DATA_NAME), (starter.reward, REWARD_NAME)):
        body = re.sub(rf"(\.\./)+{re.escape(old.removeprefix('recipes/'))}", new, body)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name).strip("-") or target
    body = re.sub(r"(?m)^name: .*$", f"name: {name}", body, count=1)
    head = f"""{about}
#
#   rlprompt reward check {folder / REWARD_NAME}
#   rlprompt train {folder / RECIPE_NAME}           # add training.steps=2 for a first try
#   rlprompt plan {folder / RECIPE_NAME} --model-size 8b --gpus 1
#   rlprompt chat runs/{name}/artifact --compare
#
# Written by `rlprompt init`: an example that runs as it is. To make it yours, change three things:
# the queries in {DATA_NAME}, the reward in {REWARD_NAME}, and init_text below.
# Keys that are left out have defaults; `rlprompt schema` describes all of them.
"""
    return head + "\n".join(_commented(body, load_recipe(source))) + "\n"


def _commented(body: str, recipe: Recipe) -> Iterator[str]:
    """The lines of a recipe in block style, each key with a comment where it comes first."""
    places: list[tuple[int, str]] = []  # keys that the line is in, with their indentation
    seen: set[tuple[str, ...]] = set()
    for line in body.splitlines():
        found = re.match(r"( *)(- )?(\w+):", line)
        if found is None:
            yield line
            continue
        indent = len(found[1]) + len(found[2] or "")
        while places and places[-1][0] >= indent:
            places.pop()
        places.append((indent, found[3]))
        keys = tuple(key for _, key in places)
        comment = "" if keys in seen else _comment(recipe, keys)
        seen.add(keys)
        if indent == 0:
            yield ""
        yield from textwrap.wrap(
            comment,
            _WIDTH,
            initial_indent=f"{found[1]}# ",
            subsequent_indent=f"{found[1]}# ",
            break_on_hyphens=False,
        )
        yield line


def _comment(recipe: Recipe, keys: tuple[str, ...]) -> str:
    """What a key means: its advice, or the first sentence of its description."""
    if keys in _ADVICE:
        return _ADVICE[keys]
    node: Any = recipe
    for key in keys[:-1]:
        node = getattr(node, key)
        node = node[0] if isinstance(node, tuple) else node
    if not isinstance(node, Settings):
        return ""
    if keys[-1] == "type":  # the class says more than "Algorithm."
        return (type(node).__doc__ or "").partition("\n")[0]
    description = type(node).model_fields[keys[-1]].description or ""
    return re.split(r"(?<=\.)\s", " ".join(description.split()), maxsplit=1)[0]
