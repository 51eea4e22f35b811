"""Runs the command line in this process, and recipes for it that train in a second."""

from __future__ import annotations

import copy
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from rlprompt.cli.main import main

TREE: dict[str, Any] = {
    "name": "tiny",
    "model": {"path": "model", "dtype": "float32", "device": "cpu"},
    "prompt": {"num_virtual_tokens": 3, "init_text": "Be nice."},
    "algorithm": {"group_size": 2},
    "sampling": {"max_tokens": 8},
    "data": {
        "rows": [
            "what is rain",
            "what is sun",
            "where is land",
            "the men went in",
            "who is he",
            "is she there",
        ],
        "heldout": 2,
    },
    "rewards": [
        {"path": "reward.py:reward", "name": "vowels"},
        {"path": "builtin:repetition", "role": "metric"},
    ],
    "training": {"steps": 3, "queries_per_step": 2, "save_every": 1},
    "evaluation": {
        "every": 2,
        "completions_per_query": 1,
        "handwritten": "Answer in one line.",
    },
}
REWARD = """
def reward(completions, **kwargs):
    return [sum(c in "aeiou" for c in text) / 8 for text in completions]
"""


@dataclass(frozen=True)
class Shown:
    """What a command left behind."""

    code: int
    out: str
    err: str


def rlprompt(*arguments: object, stdin: str = "") -> Shown:
    """Run one command in this process, as the entry point of the package does."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        _logging_restored(),
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "stdin", io.StringIO(stdin)),
    ):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Shown(code, out.getvalue(), err.getvalue())


@contextmanager
def _logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {name: each.level for name, each in _loggers().items()}
    root.handlers = []
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
        for name, each in _loggers().items():
            each.setLevel(levels.get(name, logging.NOTSET))


def _loggers() -> dict[str, logging.Logger]:
    found = logging.Logger.manager.loggerDict
    return {name: each for name, each in found.items() if isinstance(each, logging.Logger)}


def with_changes(changes: dict[str, Any]) -> dict[str, Any]:
    """The tree of a recipe that works, changed at dotted keys; None deletes a key."""
    tree = copy.deepcopy(TREE)
    for key, value in changes.items():
        *parents, last = key.split(".")
        node: Any = tree
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        if value is None:
            del node[last]
        else:
            node[int(last) if isinstance(node, list) else last] = value
    return tree


def write_recipe(folder: Path, model: Path, **changes: Any) -> Path:
    """Write a recipe that works, and its reward, into a folder. `__` in a name stands for a dot."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    tree = with_changes({"model.path": str(model), **dotted})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reward.py").write_text(REWARD)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path
