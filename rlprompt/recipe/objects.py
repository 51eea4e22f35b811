"""Python objects in the places of a recipe: a model, data, rewards or a start that is in memory.

A recipe names things by path. Where `rlprompt.train` is given an object instead, the recipe holds
`memory:NAME` there, and this table says what that is. A resolved recipe with such a path can be
read by everybody and run again only with the objects.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt

MEMORY = "memory:"
"""What a path in a recipe begins with where an object in memory stands in its place."""


@dataclass(frozen=True)
class Objects:
    """What the `memory:` paths of a recipe stand for."""

    policy: Policy | None = None
    """The base at `model.path`, under no prompt yet."""
    rows: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Rows by `data.path`, `data.heldout_path` and `data.test.path`."""
    rewards: Mapping[str, Any] = field(default_factory=dict)
    """Reward functions by `rewards.N.path`."""
    prompts: Mapping[str, Prompt] = field(default_factory=dict)
    """Prompts by `prompt.from_artifact`."""


def in_memory(path: str | None) -> bool:
    """Whether a path of a recipe stands for an object in memory."""
    return path is not None and path.startswith(MEMORY)


def rows_of(data: Any, name: str) -> list[Any]:
    """The rows of a dataset in memory: strings, or mappings of column name to value.

    Args:
        data: a list or another iterable of strings or mappings, a `datasets.Dataset`, or a
            `pandas.DataFrame`.
        name: the keyword that it was given as, for error messages.

    Raises:
        InputError: it is none of these, or a dictionary of several splits.
    """
    if isinstance(data, Mapping):
        splits = ", ".join(f"'{split}'" for split in data)
        raise InputError(
            f"{name} is a mapping ({splits}); give one dataset, such as {name}=dataset['train']"
        )
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas.DataFrame
        return list(data.to_dict("records"))
    if hasattr(data, "to_list"):  # datasets.Dataset, pandas.Series
        return list(data.to_list())
    if isinstance(data, str | bytes) or not hasattr(data, "__iter__"):
        raise InputError(
            f"{name} is of type {type(data).__name__}; give a list of texts or mappings, a "
            "datasets.Dataset, a DataFrame, or the path of a file"
        )
    return list(data)


def reward_name(reward: Callable[..., Any], taken: Collection[str]) -> str:
    """The name of a reward that is a Python object: that of the function or class.

    Args:
        reward: a function, or an object with `__call__`.
        taken: names that other rewards have.
    """
    given = str(getattr(reward, "__name__", type(reward).__name__))
    plain = re.sub(r"\W+", "", given.replace("<lambda>", "reward")) or "reward"
    name, number = plain, 2
    while name in taken:
        name, number = f"{plain}_{number}", number + 1
    return name


def source_digest(reward: Callable[..., Any]) -> str:
    """`@` and a digest of a reward's source, empty where Python has none (typed at a prompt).

    With it in the recipe, a run that is resumed with another function of the same name is refused
    as a run of another recipe.
    """
    try:
        source = inspect.getsource(reward if hasattr(reward, "__name__") else type(reward))
    except (OSError, TypeError):
        return ""
    return f"@{hashlib.sha256(source.encode()).hexdigest()[:8]}"
