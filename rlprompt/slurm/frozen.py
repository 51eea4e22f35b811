"""What a job will run, kept as it is at submission: the recipe, the user's code, and rlprompt.

A job may wait for days. What is edited meanwhile is for the next submission: the job reads copies
in its job folder, each in a folder that is named by its contents, so that equal submissions share
one. A user's file keeps its path and name (`rlprompt.user_code` reads the copy in its place), and
so do the relative paths in the recipe. Data, models and what files of the user read by themselves
are not copied.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rlprompt
from rlprompt.errors import InputError
from rlprompt.files import to_json, write_atomic
from rlprompt.reading import json_text
from rlprompt.reading.files import expanded, read_bytes, read_text
from rlprompt.recipe.paths import with_absolute_paths
from rlprompt.recipe.schema import Recipe
from rlprompt.recipe.yaml_file import apply_override, read_tree
from rlprompt.runs.claim_folder import FROZEN_RECIPE, recipe_folder
from rlprompt.slurm.script import FrozenCode
from rlprompt.user_code import FROZEN_CODE, FROZEN_FILES, frozen_folder, is_path

_SUBMISSION = "submission.json"
_DIGITS = 12
_GIT_SECONDS = 10


@dataclass(frozen=True)
class Frozen:
    """A submission as files, which `write` makes."""

    code: FrozenCode
    """Where they come to lie."""
    files: Mapping[str, bytes]
    """Contents by their path in its folder."""
    package: Mapping[str, bytes]
    """The files of rlprompt by their path in it; empty where the nodes have one of their own."""

    @property
    def recipe(self) -> Path:
        """The recipe that the job reads."""
        return self.code.folder / FROZEN_RECIPE

    def write(self) -> None:
        """Make the files, where they are not there yet.

        Raises:
            InputError: the folder cannot be written.
        """
        try:
            for name, data in self.files.items():
                _write(self.code.folder / name, data)
            if self.code.package is not None:
                for name, data in self.package.items():
                    _write(self.code.package / "rlprompt" / name, data)
        except OSError as error:
            raise InputError(
                f"'{self.code.folder}' cannot be written ({error.strerror}); name another with "
                "--output"
            ) from error


def freeze(
    path: Path,
    recipes: Sequence[Recipe],
    overrides: Sequence[Sequence[str]],
    folder: Path,
    *,
    with_package: bool,
) -> Frozen:
    """What a submission will run; reads only.

    Args:
        path: the recipe's file.
        recipes: it as each task of the job will have it.
        overrides: changes of each task, lists of `key.path=value`.
        folder: the job folder, absolute.
        with_package: whether the job runs a copy of this rlprompt; else what the nodes have.

    Raises:
        InputError: a file cannot be read.
    """
    base = recipe_folder(path).absolute()
    try:
        text = read_text(path).removeprefix("\ufeff")
        named = [*_code_files(recipes, base), *_template_files(path, overrides, base)]
        sources = {file: read_bytes(file) for file in dict.fromkeys(named)}
        package = dict(_package_files())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"what the job is to run cannot be read ({error}); mend that") from error
    names = {file: f"{place}_{file.name}" for place, file in enumerate(sources)}
    head = f"# as submitted, from {str(path.absolute())!r}; paths are relative to {str(base)!r}\n"
    version = _digest(package)
    told = {
        "recipe": str(path.absolute()),
        "overrides": [list(each) for each in overrides],
        "rlprompt": {"version": rlprompt.__version__, "code": version, "commit": _commit()},
    }
    files = {
        FROZEN_RECIPE: (head + text).encode(),
        FROZEN_FILES: to_json({str(file): name for file, name in names.items()}, indent=1).encode(),
        _SUBMISSION: to_json(told, indent=1).encode(),
        **{f"{FROZEN_CODE}/{names[file]}": data for file, data in sources.items()},
    }
    copied = folder / f"rlprompt_{version}" if with_package else None
    code = FrozenCode(folder / f"frozen_{_digest(files)}", copied)
    return Frozen(code, files, package if with_package else {})


def differing_version() -> str:
    """A sentence where this job runs another rlprompt than it was submitted with; else empty.

    Outside of a job, and in one that runs a copy, there is nothing to tell.
    """
    folder = frozen_folder()
    if folder is None:
        return ""
    try:
        told = json_text.loads(read_bytes(folder / _SUBMISSION))["rlprompt"]
        before, now = str(told["code"]), _digest(dict(_package_files()))
        version = str(told["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"what this job was submitted with cannot be read from '{folder}' ({error})"
    if before == now:
        return ""
    return (
        f"this job was submitted with rlprompt {version} (code {before}) and runs "
        f"{rlprompt.__version__} (code {now}), as its nodes have it"
    )


def _code_files(recipes: Sequence[Recipe], base: Path) -> list[Path]:
    """The user's Python files that recipes name, in the order of their names."""
    found = set()
    for recipe in recipes:
        tree = with_absolute_paths(recipe.plain(), base, classes=True)
        for text in _texts({key: value for key, value in tree.items() if key != "data"}):
            location, _, name = text.rpartition(":")
            file = location if location.endswith(".py") else name
            if is_path(text) and file.endswith(".py") and "\n" not in file:
                places = [base / file, Path.cwd() / file]
                found.update([place.resolve() for place in places if place.is_file()][:1])
    return sorted(found)


def _template_files(path: Path, overrides: Sequence[Sequence[str]], base: Path) -> Iterator[Path]:
    """The chat templates that a recipe names; a recipe that was read has their text."""
    for changes in overrides:
        tree = read_tree(path)
        for change in changes:
            apply_override(tree, change)
        model = tree.get("model")
        template = model.get("template") if isinstance(model, dict) else None
        if isinstance(template, str) and "{" not in template:
            file = (base / expanded(template, "model.template")).resolve()
            if file.is_file():
                yield file


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from _texts(value)
    elif isinstance(node, Sequence):
        for value in node:
            yield from _texts(value)


def _package_files() -> Iterator[tuple[str, bytes]]:
    root = Path(rlprompt.__file__).parent
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield str(path.relative_to(root)), path.read_bytes()


def _digest(files: Mapping[str, bytes]) -> str:
    total = hashlib.sha256()
    for name, data in sorted(files.items()):
        total.update(f"{name}\0{len(data)}\0".encode() + data)
    return total.hexdigest()[:_DIGITS]


def _commit() -> str | None:
    """The commit of a checkout, with a `+` where files differ from it; None for no checkout."""
    git = ["git", "-C", str(Path(rlprompt.__file__).parent)]
    try:
        asked = [
            subprocess.run(
                [*git, *words], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", "."))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return asked[0] + ("+" if asked[1] else "")


def _write(path: Path, data: bytes) -> None:
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data, private=True)
