"""The run folder before a run: whose it is, and what a resumed run must agree with.

A folder that holds a run is never mixed with another one. A run that ended before its first step
leaves nothing worth keeping, so a mended recipe may start in its folder.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from rlprompt import __version__
from rlprompt.errors import InputError
from rlprompt.files import write_atomic
from rlprompt.reading import yaml_text
from rlprompt.reading.files import read_text, reason
from rlprompt.runs.checkpoint import checkpoint_steps
from rlprompt.settings import folder_problem

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.resolved.yaml"
_LOCK_FILE = ".lock"
_SHOWN_DIFFERENCES = 3
# How much memory a run takes at once changes the order of sums only.
_MAY_CHANGE = ("tracking.", "distributed.", "training.token_budget")
_ABSENT = object()

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


def check_output(folder: Path, recipe: Mapping[str, Any], resume: bool, updated: Updated) -> None:
    """Refuse a folder that this run may not write to; reads only.

    Args:
        folder: the folder, which need not exist.
        recipe: the resolved recipe, as plain values.
        resume: whether the run in the folder is to go on.
        updated: function from a stored recipe to the same with the settings that a newer rlprompt
            has, at their defaults.

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
        return
    if not (folder / RECIPE_FILE).is_file():
        raise InputError(f"the output folder '{folder}' holds no run to resume; drop --resume")
    _check_same(folder / RECIPE_FILE, recipe, updated)


@contextmanager
def claim_output(
    folder: Path, recipe: Mapping[str, Any], base_dir: Path, resume: bool, updated: Updated
) -> Iterator[bool]:
    """Make the folder, hold it against other processes, and write the resolved recipe.

    Yields whether rows may be there that belong to this run or to nothing: what `Run.run` takes as
    `resume`. Arguments are those of `check_output`, and `base_dir`, which the recipe's paths are
    relative to.

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
        write_atomic(folder / RECIPE_FILE, _resolved_text(recipe, base_dir))
        yield begun


def _resolved_text(recipe: Mapping[str, Any], base_dir: Path) -> str:
    head = f"# rlprompt {__version__}; paths are relative to {str(base_dir.absolute())!r}\n"
    return head + yaml_text.dump(dict(recipe), allow_unicode=True, width=100)


def _has_steps(folder: Path) -> bool:
    """Whether something in the folder cost a training step."""
    metrics = folder / "metrics.jsonl"
    return (
        bool(checkpoint_steps(folder / "checkpoints"))
        or (folder / "summary.json").exists()
        or (folder / "artifact").exists()
        or (metrics.exists() and metrics.stat().st_size > 0)
    )


def _check_same(path: Path, recipe: Mapping[str, Any], updated: Updated) -> None:
    try:
        stored = yaml_text.load(read_text(path), 2 * yaml_text.MOST_NODES)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read ({reason(error)}); start a new run") from error
    except yaml.YAMLError as error:
        why = yaml_text.problem(error)
        raise InputError(f"'{path}' cannot be read ({why}); start a new run") from error
    # Through YAML and back, as the stored one went.
    before = _flat(updated(stored))
    now = _flat(yaml_text.load(yaml_text.dump(dict(recipe)), 2 * yaml_text.MOST_NODES))
    changed = [
        key
        for key in dict.fromkeys([*now, *before])
        if before.get(key, _ABSENT) != now.get(key, _ABSENT) and not key.startswith(_MAY_CHANGE)
    ]
    if changed:
        listed = ", ".join(
            f"{key} (was {_shown(before.get(key, _ABSENT))}, is {_shown(now.get(key, _ABSENT))})"
            for key in changed[:_SHOWN_DIFFERENCES]
        )
        more = len(changed) - _SHOWN_DIFFERENCES
        rest = f" and {more} more" if more > 0 else ""
        raise InputError(
            f"the run in '{path.parent}' has another recipe: {listed}{rest}; resume with the same "
            "recipe and overrides, or start a new run with another --output"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to plain values; entries of lists by their index."""
    items: list[tuple[Any, Any]] = []
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    if not items:
        return {prefix.removesuffix("."): tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}{key}.")
    return flat


def _shown(value: Any) -> str:
    text = "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
