"""The run folder before a run: whose it is, and what a resumed run must agree with.

A folder that holds a run is never mixed with another one. A run that ended before its first step
leaves nothing worth keeping, so a mended recipe may start in its folder.
"""

from __future__ import annotations

import ast
import fcntl
import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from rlprompt import __version__
from rlprompt.errors import InputError
from rlprompt.files import write_atomic
from rlprompt.reading import yaml_text
from rlprompt.reading.files import read_text, reason
from rlprompt.runs.changes import (
    ABSENT,
    Change,
    changes_between,
    effects_of,
    is_of_server,
)
from rlprompt.runs.checkpoint import checkpoint_steps
from rlprompt.settings import folder_problem

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.resolved.yaml"
FROZEN_RECIPE = "recipe.frozen.yaml"
"""A recipe as it was when a job was submitted; see `rlprompt.slurm.frozen`."""
_LOCK_FILE = ".lock"
MEMBERS = "members"
"""Folder of a population's run that holds those of its members."""
_OVERRIDDEN = "# set on the command line: "
_BASE_DIR = re.compile(r"# .*paths are relative to (?P<folder>['\"].+['\"])")
_SHOWN_DIFFERENCES = 3

Updated = Callable[[Any], Any]


def default_output(name: str) -> Path:
    """The run folder of a recipe when none is named: `runs/<name>`.

    Args:
        name: name of the recipe.

    Raises:
        InputError: the name cannot be that of a folder.
    """
    problem = folder_problem(name)
    if problem:
        raise InputError(
            f"the name {name[:80]!r} cannot be a folder under runs/ (it {problem}); change it, or "
            "name the run folder with --output"
        )
    return Path("runs") / name


def check_output(
    folder: Path, recipe: Mapping[str, Any], resume: bool, updated: Updated
) -> list[Change]:
    """Refuse a folder that this run may not write to; reads only.

    Args:
        folder: the folder, which need not exist.
        recipe: the resolved recipe, as plain values.
        resume: whether the run in the folder is to go on.
        updated: function from a stored recipe to the same with the settings that a newer rlprompt
            has, at their defaults.

    Returns:
        What the recipe changes in the run that is there; see `CHANGEABLE`.

    Raises:
        InputError: it is a file, it holds another run, or (with `resume`) it holds no run or the
            run of another recipe.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the output '{folder}' is a file; name a folder")
    if not resume:
        if _has_steps(folder):
            raise InputError(
                f"the output folder '{folder}' holds another run; go on with it (--resume), or "
                "name another folder with --output"
            )
        return []
    require_run(folder)
    return _allowed_changes(folder / RECIPE_FILE, recipe, updated)


def require_run(folder: Path) -> None:
    """Refuse a folder in which no run was begun, or that is a part of one.

    Raises:
        InputError: see above.
    """
    whole = folder.absolute().parent.parent
    if folder.absolute().parent.name == MEMBERS and (whole / RECIPE_FILE).is_file():
        raise InputError(
            f"'{folder}' is a member of the population in '{whole}'; go on with that one"
        )
    if not (folder / RECIPE_FILE).is_file():
        raise InputError(
            f"the output folder '{folder}' holds no run to resume; name the folder that a run was "
            "begun in, or begin one with `rlprompt train` and without --resume"
        )


@contextmanager
def claim_output(
    folder: Path,
    recipe: Mapping[str, Any],
    base_dir: Path,
    resume: bool,
    updated: Updated,
    overridden: Sequence[str] = (),
) -> Iterator[bool]:
    """Make the folder, hold it against other processes, and write the resolved recipe.

    Yields whether rows may be there that belong to this run or to nothing: what `Run.run` takes as
    `resume`.

    Args:
        folder: the folder, as for `check_output`.
        recipe: the resolved recipe, as plain values.
        base_dir: folder that what is relative in it is relative to.
        resume: whether the run in the folder is to go on.
        updated: function of stored recipes, as for `check_output`.
        overridden: dotted keys that were set beside the recipe's file, to be remembered.

    Raises:
        InputError: the folder cannot be written, another process trains in it, or `check_output`
            objects to what happened since it was asked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK_FILE).open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"the output folder '{folder}' cannot be written ({error.strerror}); name another with "
            "--output"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process trains in '{folder}'; wait for it, or name another with --output"
            ) from error
        except OSError as error:  # some network file systems have no locks
            logger.warning("'%s' cannot be locked (%s): start no second run there", folder, error)
        check_output(folder, recipe, resume, updated)
        begun = resume or (folder / RECIPE_FILE).exists()
        if not resume:
            (folder / "wandb_id").unlink(missing_ok=True)  # curves of a run that never had a step
        write_atomic(folder / RECIPE_FILE, _resolved_text(recipe, base_dir, overridden))
        yield begun


def _resolved_text(recipe: Mapping[str, Any], base_dir: Path, overridden: Sequence[str]) -> str:
    head = f"# rlprompt {__version__}; paths are relative to {str(base_dir.absolute())!r}\n"
    if overridden:
        head += f"{_OVERRIDDEN}{json.dumps(list(dict.fromkeys(overridden)))}\n"
    return head + yaml_text.dump(dict(recipe), allow_unicode=True, width=100)


def recipe_folder(recipe: Path) -> Path:
    """The folder that relative paths in a recipe's file are relative to.

    That is its own folder; the resolved recipe of a run and that of a job say which it was.
    """
    if recipe.name in (RECIPE_FILE, FROZEN_RECIPE):
        for line in _head(recipe):
            found = _BASE_DIR.fullmatch(line)
            if found is not None:
                with suppress(ValueError, SyntaxError):
                    return Path(ast.literal_eval(found["folder"]))
    return recipe.parent


def overridden_keys(folder: Path) -> list[str]:
    """The dotted keys that were set beside the recipe's file when a run was begun or resumed."""
    for line in _head(folder / RECIPE_FILE):
        if line.startswith(_OVERRIDDEN):
            try:
                keys = json.loads(line.removeprefix(_OVERRIDDEN))
            except ValueError:
                return []
            return [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
    return []


def _head(path: Path) -> Iterator[str]:
    """The comments that a file begins with."""
    try:
        with path.open(encoding="utf-8") as handle:
            for line in handle:
                if not line.startswith("#"):
                    return
                yield line.rstrip("\n")
    except (OSError, UnicodeDecodeError):
        return


def _has_steps(folder: Path) -> bool:
    """Whether something in the folder cost a training step."""
    metrics = folder / "metrics.jsonl"
    return (
        bool(checkpoint_steps(folder / "checkpoints"))
        or (folder / "summary.json").exists()
        or (folder / "artifact").exists()
        or (metrics.exists() and metrics.stat().st_size > 0)
    )


def _allowed_changes(path: Path, recipe: Mapping[str, Any], updated: Updated) -> list[Change]:
    try:
        stored = yaml_text.load(read_text(path), 2 * yaml_text.MOST_NODES)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read ({reason(error)}); start a new run") from error
    except yaml.YAMLError as error:
        why = yaml_text.problem(error)
        raise InputError(f"'{path}' cannot be read ({why}); start a new run") from error
    # Through YAML and back, as the stored one went.
    now = yaml_text.load(yaml_text.dump(dict(recipe)), 2 * yaml_text.MOST_NODES)
    changes = changes_between(updated(stored), now)
    server = os.environ.get(
        "RLPROMPT_SERVER"
    )  # of a job that brings one, on a node of this attempt
    refused = [each for each in changes if not (each.is_allowed or is_of_server(each, server))]
    if refused:
        listed = ", ".join(
            f"{each.key} (was {_shown(each.before)}, is {_shown(each.now)})"
            for each in refused[:_SHOWN_DIFFERENCES]
        )
        more = len(refused) - _SHOWN_DIFFERENCES
        rest = f" and {more} more" if more > 0 else ""
        raise InputError(
            f"the run in '{path.parent}' has another recipe: {listed}{rest}; go on as it began "
            f"with `rlprompt resume {shlex.quote(str(path.parent))}`, or start a new run with "
            "another --output"
        )
    return changes


def told(changes: Sequence[Change], recipe: Mapping[str, Any]) -> list[str]:
    """One line about each change of a run that goes on, and about what else it does."""
    shown = [f"{each.key}: {_shown(each.before)} -> {_shown(each.now)}" for each in changes]
    return [*shown, *effects_of(changes, recipe)]


def _shown(value: Any) -> str:
    text = "absent" if value is ABSENT else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
