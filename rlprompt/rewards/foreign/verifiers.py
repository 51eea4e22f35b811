"""Rubrics of the verifiers library (0.1 to 0.3), unchanged, behind TRL's signature.

verifiers counts an exception in a reward function as 0.0; here it follows `on_error`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlprompt.errors import InputError, shorten
from rlprompt.rewards.base import RewardFunction

_PLURALS = {
    "states": "state",
    "prompts": "prompt",
    "completions": "completion",
    "answers": "answer",
    "infos": "info",
    "tasks": "task",
}
"""Keywords by which verifiers knows a function that wants a whole group."""


class _Call(NamedTuple):
    """A call of one function."""

    rows: list[int]
    """The rows that it is about."""
    run: Callable[[], Any]


class _Result(NamedTuple):
    """What a call gave."""

    rows: list[int]
    value: Any
    """A number, or one per row."""


class VerifiersReward:
    """A `Rubric` of verifiers, or one reward function of one; values are summed with its weights.

    A function gets those of `prompt`, `completion`, `answer`, `info`, `task`, `state`, `parser` and
    the dataset's columns that its signature names; one that names `prompts`, `completions`, ...
    gets a whole group and returns a list. `state` holds prompt, completion, answer and info only:
    there is no environment behind it. A function of weight 0 is a metric and logged as a column.
    """

    def __init__(self, rubric: Any, options: Mapping[str, Any]) -> None:
        """Take functions and weights over from the rubric.

        Raises:
            InputError: it is no rubric, has no function, or options are given to one.
        """
        functions = getattr(rubric, "funcs", None) or getattr(rubric, "reward_funcs", None)
        if functions is None and inspect.isroutine(rubric):
            functions = [rubric]
        elif options:
            raise InputError("a rubric takes no options; remove them, or set them in its own file")
        if not functions:
            raise InputError(
                "this is no verifiers rubric with functions, and no function; name a Rubric of "
                "verifiers 0.1 to 0.3 or one of its reward functions"
            )
        weights = getattr(rubric, "weights", None) or getattr(rubric, "reward_weights", None)
        self.functions = self.user_functions = list(functions)
        self.weights = [float(each) for each in weights or [1.0] * len(self.functions)]
        self.objects = {**getattr(rubric, "class_objects", {}), **options}

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        log_extra: Callable[..., None],
        group_index: list[int],
        **columns: Any,
    ) -> list[float]:
        """The weighted sum per completion."""
        states = _states(prompts, completions, columns)
        tables = [
            [_Result(call.rows, call.run()) for call in self._calls(function, states, group_index)]
            for function in self.functions
        ]
        return self._totals(tables, len(states), log_extra)

    def _calls(
        self, function: Any, states: Sequence[dict[str, Any]], group_index: Sequence[int]
    ) -> list[_Call]:
        """The calls of one function."""
        if not _PLURALS.keys() & inspect.signature(function).parameters.keys():
            return [
                _Call([row], _named(function, {**state, "state": state, **self.objects}))
                for row, state in enumerate(states)
            ]
        calls = []
        for group in dict.fromkeys(group_index):
            rows = [row for row, each in enumerate(group_index) if each == group]
            members = [{**states[row], "state": states[row]} for row in rows]
            given = {many: [each[one] for each in members] for many, one in _PLURALS.items()}
            calls.append(_Call(rows, _named(function, given | self.objects)))
        return calls

    def _totals(
        self,
        tables: Sequence[Sequence[_Result]],
        num_completions: int,
        log_extra: Callable[..., None],
    ) -> list[float]:
        totals = [0.0] * num_completions
        for function, weight, table in zip(self.functions, self.weights, tables, strict=True):
            values = [0.0] * num_completions
            for result in table:
                numbers = _numbers(function, result)
                for row, value in zip(result.rows, numbers, strict=True):
                    values[row] = value
            log_extra(getattr(function, "__name__", "rubric"), values)
            totals = [total + weight * value for total, value in zip(totals, values, strict=True)]
        return totals


def _numbers(function: Any, result: _Result) -> list[float]:
    """What a function gave, as one number per row.

    Raises:
        TypeError: it gave something else, or another number of them.
    """
    found = result.value if isinstance(result.value, list | tuple) else [result.value]
    name = f"{getattr(function, '__name__', 'the function')}()"
    if len(found) != len(result.rows):
        raise TypeError(f"{name} returned {len(found)} values for {len(result.rows)} completions")
    try:
        return [float(value) for value in found]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} returned {shorten(repr(result.value))}, no number") from error


class AsyncVerifiersReward(VerifiersReward):
    """`VerifiersReward` for a rubric with a coroutine function among its functions."""

    async def __call__(  # type: ignore[override]
        self,
        prompts: list[Any],
        completions: list[Any],
        log_extra: Callable[..., None],
        group_index: list[int],
        **columns: Any,
    ) -> list[float]:
        """The weighted sum per completion; the calls of each function run together."""
        states = _states(prompts, completions, columns)
        tables = []
        for function in self.functions:
            calls = self._calls(function, states, group_index)
            results = [call.run() for call in calls]
            if inspect.iscoroutinefunction(function):
                results = list(await asyncio.gather(*results))
            tables.append(
                [_Result(call.rows, each) for call, each in zip(calls, results, strict=True)]
            )
        return self._totals(tables, len(states), log_extra)


def make_verifiers(rubric: Any, options: Mapping[str, Any]) -> RewardFunction:
    """A verifiers reward, async when one of the functions is.

    Raises:
        InputError: see `VerifiersReward`.
    """
    plain = VerifiersReward(rubric, options)
    if any(inspect.iscoroutinefunction(each) for each in plain.functions):
        return AsyncVerifiersReward(rubric, options)
    return plain


def _named(function: Any, available: Mapping[str, Any]) -> Callable[[], Any]:
    """The call with those keywords that the function's signature names."""
    parameters = inspect.signature(function).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return functools.partial(function, **available)
    accepted = {key: value for key, value in available.items() if key in parameters}
    return functools.partial(function, **accepted)


def _states(
    prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What is known of each rollout: the row's columns, query and completion."""
    lists = {key: column for key, column in columns.items() if isinstance(column, list)}
    return [
        {
            "answer": "",
            "info": {},
            "task": None,
            **{key: column[row] for key, column in lists.items()},
            "prompt": prompt,
            "completion": completion,
        }
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
