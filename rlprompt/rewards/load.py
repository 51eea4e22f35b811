"""From the path in a recipe to a callable reward, with one clear sentence for each way to fail.

What a path names is found as all user code is (`rlprompt.user_code`). To use a reward in another
process, send its settings and load it there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from rlprompt.errors import InputError, choices, describe_error, shorten, user_frame
from rlprompt.process_exit import forks_end
from rlprompt.rewards.base import (
    BATCH_KEYWORDS,
    RESERVED_KEYWORDS,
    Adapter,
    RewardFunction,
    RewardSettings,
)
from rlprompt.rewards.foreign.signatures import ADAPTERS
from rlprompt.rewards.processes.main_thread import watch
from rlprompt.user_code import load_object, own_objects

_USUAL_NAME: Mapping[Adapter, str] = {
    "trl": "reward",
    "verl": "compute_score",
    "openrlhf": "reward_func",
    "verifiers": "rubric",
    "dspy": "metric",
}
"""What the reward in a file is called where the path does not say."""
_MARKS: Mapping[Adapter, frozenset[str]] = {
    "trl": frozenset(BATCH_KEYWORDS),
    "verl": frozenset({"solution_str"}),
    "openrlhf": frozenset({"queries"}),
    "verifiers": frozenset({"completion", "completions", "state", "states", "answer"}),
    "dspy": frozenset({"pred", "prediction"}),
}
"""Parameters by which a reward is known."""


def load_reward(
    settings: RewardSettings,
    base_dir: Path,
    builtin: Mapping[str, str],
    given: Mapping[str, Any] | None = None,
) -> RewardFunction:
    """Resolve `settings.path` and give it `settings.options`.

    A class is constructed with the options. A function that takes none of `prompts`, `completions`,
    `completion_ids` and has no `**kwargs` cannot be a reward, so it is called with the options and
    must return one (TRL's `get_..._reward` functions work so). Any other callable is the reward,
    and the options are bound to it.

    Args:
        settings: the path and options of one reward.
        base_dir: the folder that file paths are relative to; the working directory comes second.
        builtin: the built-in rewards, name -> `package.module:object`.
        given: the reward functions in memory, by the path that stands for them.

    Raises:
        InputError: the file, module or object is missing, importing it raised, it is not callable,
            or an option is unknown or wrong.
    """
    watch()
    try:
        known = given or {}
        with forks_end():
            if settings.path in known:
                target = known[settings.path]
            else:
                target = resolve_target(settings.path, base_dir, builtin, settings.adapter)
            return _configure(target, settings, base_dir)
    except InputError as error:
        raise InputError(f"reward '{settings.name}': {error}") from error


def resolve_target(
    path: str, base_dir: Path, builtin: Mapping[str, str], adapter: Adapter = "trl"
) -> Any:
    """The function, class or object that a reward path names, before any option is given to it.

    Args:
        path: the path, see `RewardSettings.path`.
        base_dir: the folder that file paths are relative to; the working directory comes second.
        builtin: the built-in rewards, name -> `package.module:object`.
        adapter: framework whose signature the reward has, for a file that is named alone.

    Raises:
        InputError: see `load_reward`.
    """
    location, _, name = path.rpartition(":")
    if location == "memory":
        raise InputError(
            f"'{path}' was a Python object of the program that began this run; name a file as "
            "path/file.py:object, or call rlprompt.train with the object"
        )
    if location == "builtin":
        if name not in builtin:
            raise InputError(f"there is no built-in {name!r}; {choices(name, builtin)}")
        return load_object(builtin[name], base_dir)
    if location == "trl":
        return _resolve_trl(name)
    if path.isidentifier():
        raise InputError(
            f"{path!r} is not a reward path; write path/file.py:object, package.module:object "
            f"or builtin:NAME with {choices(path, builtin)}"
        )
    return load_object(path, base_dir, functools.partial(_only_reward, adapter=adapter))


def _only_reward(module: ModuleType, file: str, adapter: Adapter) -> Any:
    """The reward in a file that is named alone: the one of the usual name, or else the only one."""
    own, usual = own_objects(module), _USUAL_NAME[adapter]
    if usual in vars(module):
        return vars(module)[usual]
    found = {name: each for name, each in own.items() if _can_be_reward(each, adapter)}
    if len(found) == 1:
        return next(iter(found.values()))
    name = Path(file).name
    if found:
        raise InputError(
            f"{file} holds several rewards ({', '.join(found)}) and none that is called "
            f"'{usual}'; write {name}:NAME with the one to use"
        )
    there = f", only {', '.join(own)}" if own else ""
    raise InputError(
        f"{file} holds no '{usual}' and nothing else that can be a reward{there}; define it, or "
        f"write {name}:NAME with the object to use"
    )


def _can_be_reward(target: Any, adapter: Adapter) -> bool:
    """Whether an object has the signature of a reward, or is a class of such objects."""
    if adapter == "verifiers" and hasattr(target, "score_rollout"):  # a rubric
        return True
    if not callable(target):
        return False
    called = target
    if inspect.isclass(target):
        called = target.__dict__.get("__call__")
    if called is None:
        return False
    parameters = _parameters(called)
    marks = _MARKS[adapter]
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return bool(marks & parameters.keys()) or (takes_all and len(parameters) == 1)


def _resolve_trl(name: str) -> Any:
    """A reward of TRL's by its name; TRL is optional."""
    if importlib.util.find_spec("trl") is None:
        raise InputError("TRL is not installed; run `pip install 'rlprompt[trl]'`")
    module = importlib.import_module("trl.rewards")
    known = [each for each in dir(module) if "reward" in each or "punishment" in each]
    known = [each for each in known if inspect.isfunction(getattr(module, each, None))]
    if name not in known:
        raise InputError(f"TRL ships no reward {name!r}; {choices(name, known)}")
    return getattr(module, name)


def _configure(target: Any, settings: RewardSettings, base_dir: Path) -> RewardFunction:
    options: Mapping[str, Any] = settings.options
    if hasattr(target, "resolve_paths"):  # options that name files, relative to the recipe's folder
        options = target.resolve_paths(options, base_dir)
    if settings.adapter != "trl":
        return ADAPTERS[settings.adapter](target, options)
    if not callable(target):
        raise InputError(
            f"{settings.path} is of type {type(target).__name__}, which cannot be called; name a "
            f"function or a class with __call__"
        )
    if _is_factory(target) and _MARKS["dspy"] & _parameters(target).keys():
        raise InputError(
            f"{settings.path} has the parameters of a DSPy metric, not of a TRL reward; set "
            "adapter: dspy"
        )
    if inspect.isclass(target) or _is_factory(target):
        reward = _construct(target, options)
    else:
        reward = _bind(target, options)
    if not callable(reward):
        raise InputError(
            f"{settings.path} makes an object of type {type(reward).__name__}, which cannot be "
            f"called; define __call__(self, completions, **kwargs)"
        )
    return reward  # type: ignore[no-any-return]


def _is_factory(target: Any) -> bool:
    parameters = _parameters(target)
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return False
    return inspect.isfunction(target) and not set(parameters) & set(BATCH_KEYWORDS)


def _construct(maker: Any, options: Mapping[str, Any]) -> Any:
    parameters = _parameters(maker)
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        _require_known(options, parameters)
    try:
        inspect.signature(maker).bind(**options)
    except TypeError as error:
        raise InputError(f"wrong options for {maker.__name__}: {error}; set them") from error
    except ValueError:
        pass  # no signature to check against: the constructor itself will say
    try:
        return maker(**options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "options"
        raise InputError(
            f"option '{key}' is wrong: {first['msg'].removeprefix('Value error, ')} "
            f"(got {shorten(repr(first['input']))}); correct it"
        ) from error
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"making {maker.__name__} from options {shorten(repr(dict(options)))} raised "
            f"{describe_error(error)} at {user_frame(error)}; correct the options"
        ) from error


def _bind(function: Any, options: Mapping[str, Any]) -> Any:
    if not options:
        return function
    _require_known(options, _parameters(function))
    return functools.partial(function, **options)


def _require_known(options: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    known = [
        name
        for name, each in parameters.items()
        if name not in RESERVED_KEYWORDS
        and each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    for key in options:
        if key in RESERVED_KEYWORDS:
            raise InputError(f"option '{key}' is reserved for the batch; remove it")
        if key not in known:
            raise InputError(f"there is no option '{key}'; {choices(key, known)}")


def _parameters(target: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return {}
