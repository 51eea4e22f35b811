"""Turning what user code returned, logged or raised into numbers, or into one clear sentence."""

from __future__ import annotations

import functools
import inspect
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple

from rlprompt.errors import (
    InputError,
    describe_error,
    first_error,
    is_users,
    quote,
    shorten,
    source_line,
    user_frame,
)
from rlprompt.rewards.base import (
    GROUP_KEYWORD,
    RESERVED_KEYWORDS,
    ReportedError,
    RewardFunction,
)
from rlprompt.rewards.processes.execution import Call, Outcome
from rlprompt.tracking.names import metric_name
from rlprompt.types import Completion, Query


class Row(NamedTuple):
    """One completion with its query."""

    query: Query
    completion: Completion


NOT_A_LIST = "return a list with one float or None per completion"
_FLOAT32_MAX = 3.4028234e38
_EXACT = 2.0**63
_LONGEST_NAME = 200


class InvalidValuesError(Exception):
    """What a reward returned or logged is not usable; the message says why, without its name."""


@dataclass
class Sink:
    """Receives `log_extra` and `log_metric` of one call; dropped when the call fails.

    What its columns hold after `close` is plain: texts, numbers and what JSON makes of them.
    """

    extras: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[Any]] = field(default_factory=dict)
    is_closed: bool = False

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Add values of a column; over the whole call one per completion."""
        self._check_open(f"log_extra({shown(column)}, ...)")
        self.extras.setdefault(_name(column, "column"), []).extend(values)

    def log_metric(self, name: str, value: float) -> None:
        """Add a number; calls with the same name are averaged."""
        self._check_open(f"log_metric({shown(name)}, ...)")
        self.metrics.setdefault(_name(name, "metric"), []).append(value)

    def close(self) -> None:
        """Take nothing more: what a thread of the reward logs later would belong to no batch."""
        self.is_closed = True
        self.extras = {
            column: [plain_value(value) for value in values]
            for column, values in self.extras.items()
        }

    def check(self, num_completions: int) -> None:
        """Raise InvalidValuesError for columns of the wrong length and numbers that are none."""
        for column, values in self.extras.items():
            if len(values) != num_completions:
                raise InvalidValuesError(
                    f"logged {len(values)} values in column {shown(column)} for {num_completions} "
                    f"completions; call log_extra with one value per completion"
                )
        for name, values in self.metrics.items():
            if name.startswith("rewards/"):
                raise InvalidValuesError(
                    f"logged a metric '{name}'; names under rewards/ are taken, choose another"
                )
            for value in values:
                number = _as_float(value)
                if number is None or not math.isfinite(number):
                    raise InvalidValuesError(
                        f"logged {shown(value)} as metric {shown(name)}; log a finite number"
                    )

    def numbers(self) -> dict[str, list[float]]:
        """Checked metrics by the name that each has in a run's record, see `tracking.names`."""
        found: dict[str, list[float]] = {}
        for name, values in self.metrics.items():
            numbers = [number for number in map(_as_float, values) if number is not None]
            found.setdefault(metric_name(name), []).extend(numbers)
        return found

    def _check_open(self, what: str) -> None:
        if self.is_closed:
            raise RuntimeError(f"{what} came after the reward had returned; log before it returns")


def parse_values(output: Any, rows: Sequence[Row]) -> list[float]:
    """One float per completion, NaN for None.

    Accepts lists and tuples, and one-dimensional tensors and arrays as TRL does; elements may be
    bools, numbers, or zero-dimensional tensors and arrays.

    Raises:
        InvalidValuesError: another type or length, or an element that is no finite number.
    """
    if getattr(output, "ndim", None) == 1 and hasattr(output, "tolist"):
        output = output.tolist()
    if not isinstance(output, list | tuple):
        advice = NOT_A_LIST
        if inspect.iscoroutine(output):
            output.close()
            advice = "define it with async def, so that it is awaited"
        raise InvalidValuesError(
            f"returned a value of type {type(output).__name__}, not a list; {advice}"
        )
    if len(output) != len(rows):
        raise InvalidValuesError(
            f"returned {len(output)} values for {len(rows)} completions "
            f"(first query: {quote(rows[0].query.text)}); return one float or None per completion"
        )
    return [_parse_value(value, position, rows) for position, value in enumerate(output)]


def describe_failure(call: Call, outcome: Outcome, rows: Sequence[Row]) -> str:
    """The sentence for a call that raised or timed out, with the batch's first row as example."""
    example = f"for example on {_describe(rows[0])}"
    if outcome.timed_out:
        return (
            f"reward '{call.name}' took longer than its timeout of {call.timeout:g} s for "
            f"{len(rows)} completions, {example}; make it faster or raise the timeout"
        )
    assert outcome.error is not None
    error = first_error(outcome.error)
    if isinstance(error, ReportedError):
        advice = f"; {error.advice}" if error.advice else ""
        return f"reward '{call.name}' {error}, {example}{advice}"
    return (
        f"reward '{call.name}' raised {describe_error(error)} at "
        f"{user_place(error, call.function)}, {example}; mend it"
    )


def select_keywords(
    name: str, function: RewardFunction, available: Mapping[str, Any]
) -> dict[str, Any]:
    """The keywords that `function` accepts; `group_index` only if it names it, as TRL has none.

    Raises:
        InputError: it needs a keyword that is neither reserved nor a column, it takes one by
            position only, or an option of the recipe has the name of a column.
    """
    bound = getattr(function, "keywords", {})
    for key in bound:
        if key in available:
            raise InputError(
                f"reward '{name}': '{key}' is both an option and a dataset column; rename one"
            )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {key: value for key, value in available.items() if key != GROUP_KEYWORD}
    for each in parameters:
        if each.default is not each.empty or each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        if each.kind is each.POSITIONAL_ONLY:
            raise InputError(
                f"reward '{name}' takes '{each.name}' by position only, but rewards are called "
                f"with keywords; remove the '/' from its signature"
            )
        if each.name not in available:
            columns = [key for key in available if key not in RESERVED_KEYWORDS]
            raise InputError(
                f"reward '{name}' needs the dataset column '{each.name}', but the columns are "
                f"{', '.join(columns) or 'none'}; add the column, give '{each.name}' as an option "
                f"or give it a default"
            )
    accepted = {each.name for each in parameters}
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        accepted |= available.keys() - {GROUP_KEYWORD}
    return {key: value for key, value in available.items() if key in accepted}


def mean(numbers: Sequence[float]) -> float:
    """Of finite numbers; it does not overflow where their sum would."""
    return sum(number / len(numbers) for number in numbers)


def shown(value: Any) -> str:
    """A value of user code for a sentence: its `repr`, shortened, whatever that does."""
    try:
        return shorten(repr(value))
    except Exception as error:
        if type(value) is int:  # Python prints no more than 4,300 digits
            return f"an integer of {value.bit_length()} bits"
        return f"an object of type {type(value).__name__}, whose repr raises {type(error).__name__}"


def plain_value(value: Any, depth: int = 6) -> Any:
    """A value of user code in a form that JSON has: its text where it has none or lies too deep."""
    try:
        return _plain(value, depth)
    except Exception:  # an object of the user's may do anything when it is asked
        return shown(value)


def _plain(value: Any, depth: int) -> Any:
    if value is None or type(value) in (bool, float):
        return value
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "tolist") and hasattr(value, "ndim"):
        value = value.tolist()
    number = _as_float(value)
    if number is not None:
        return int(value) if isinstance(value, int) and abs(number) < _EXACT else number
    if depth and isinstance(value, Mapping):
        return {
            (key if isinstance(key, str) else shown(key)): plain_value(each, depth - 1)
            for key, each in value.items()
        }
    if depth and isinstance(value, list | tuple | set | frozenset):
        return [plain_value(each, depth - 1) for each in value]
    return shown(value)


def _name(name: Any, kind: str) -> str:
    """A name that can be logged under.

    Raises:
        TypeError: it is no text.
        ValueError: it is empty, too long, or has characters that no table shows.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a {kind} is {shown(name)}; give a text")
    if not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
        raise ValueError(
            f"the name of a {kind} is {shown(name)}; give 1 to {_LONGEST_NAME} printable characters"
        )
    return str(name)


def _parse_value(value: Any, position: int, rows: Sequence[Row]) -> float:
    if value is None:
        return math.nan
    number = _as_float(value)
    if number is not None and abs(number) <= _FLOAT32_MAX:  # False for NaN
        return number
    raise InvalidValuesError(
        f"returned {shown(value)} for completion {position + 1} of {len(rows)} "
        f"({_describe(rows[position])}); return a finite number, or None for what cannot be scored"
    )


def _as_float(value: Any) -> float | None:
    """The number that a value is; infinite beyond float64, None for what is no number."""
    try:
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            value = value.item()
        return float(value) if isinstance(value, bool | int | float) else None
    except OverflowError:
        return math.inf
    except Exception:  # an object of the user's may do anything when it is asked
        return None


def _describe(row: Row) -> str:
    return f"query {quote(row.query.text)} with completion {quote(row.completion.text)}"


def user_place(error: BaseException, function: RewardFunction) -> str:
    """`path:line (source)` in the user's code: where a reward raised, or where it is defined.

    A call that the reward's signature does not take is raised where it is made, which is ours: then
    it is the line of the definition that must change.

    Args:
        error: what calling the reward raised.
        function: the reward, with whatever is wrapped around it.
    """
    written = _written(function)
    # An adapter may call several functions; Python's message names the one that was called.
    named = [each for each in written if f"{getattr(each, '__name__', '')}()" in str(error)]
    codes = [code for each in (named or written) if (code := _code_of(each)) is not None]
    files = [code.co_filename for code in codes]
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = [frame.filename for frame in frames if frame.filename in files]
    if raised_in or not codes or any(is_users(frame.filename) for frame in frames):
        return user_frame(error, raised_in[-1] if raised_in else None)
    if not is_users(files[0]) or isinstance(error, SyntaxError):
        return user_frame(error, files[0])
    return source_line(files[0], codes[0].co_firstlineno)


def source_file(function: RewardFunction) -> str | None:
    """The file that defines the reward, to find its line in a traceback."""
    code = _code_of(_written(function)[0])
    return None if code is None else code.co_filename


def _written(function: Any) -> list[Any]:
    """What the user has written, without the options and adapters around it."""
    while isinstance(function, functools.partial):  # binds the recipe's options
        function = function.func
    inner = getattr(function, "user_functions", None)
    return [each for one in inner for each in _written(one)] if inner else [function]


def _code_of(function: Any) -> CodeType | None:
    function = inspect.unwrap(function) if callable(function) else function
    called = function if inspect.isroutine(function) else type(function).__call__
    code = getattr(called, "__code__", None)
    return code if isinstance(code, CodeType) else None
