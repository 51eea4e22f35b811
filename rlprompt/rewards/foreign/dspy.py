"""Metrics of DSPy (2.6 to 3.4), unchanged, behind TRL's signature.

    def metric(example, pred, trace=None):                          # dspy.Evaluate
    def metric(gold, pred, trace, pred_name, pred_trace):           # dspy.GEPA

`example` has the dataset's columns as fields and the query as `question`; `pred` has the completion
as `answer`. Another name of either field is an option: `input: text`, `output: label`. Where a
query has earlier turns, they are `example.history.messages`, as in DSPy. Nothing ran that could be
traced, so `trace`, `pred_name` and `pred_trace` are None.

Examples and predictions are DSPy's own where the metric's module has imported dspy, and behave like
them where it has not: dspy need not be installed.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import Any, Self

from rlprompt.errors import InputError, choices, quote
from rlprompt.rewards.base import RewardFunction
from rlprompt.rewards.rules.text import message_text

_NAMES = {"input": "question", "output": "answer"}
"""Options of the adapter, and what the fields are called without them."""
_ABSENT = ("trace", "pred_name", "pred_trace")
"""What a metric is given beside example and prediction, always None here."""
_TURNS = "history"
_MISSING = object()


class Fields:
    """The fields of an example or a prediction, as attributes and as items."""

    def __init__(self, values: Mapping[str, Any], inputs: Sequence[str] = ()) -> None:
        """Hold fields.

        Args:
            values: values by name.
            inputs: names of those that a program is given; the others are labels.
        """
        self.__dict__["_store"] = dict(values)
        self.__dict__["_input_keys"] = {name for name in inputs if name in values}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self._store:
            raise AttributeError(f"there is no field {quote(name)}; {choices(name, self._store)}")
        return self._store[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self._store[name] = value

    def __getitem__(self, name: str) -> Any:
        if name not in self._store:
            raise KeyError(f"there is no field {quote(name)}; {choices(name, self._store)}")
        return self._store[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._store[name] = value

    def __contains__(self, name: object) -> bool:
        return name in self._store

    def __iter__(self) -> Iterator[str]:
        return iter(self._store)

    def __len__(self) -> int:
        return len(self._store)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._store})"

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or `default` where there is none."""
        return self._store.get(name, default)

    def keys(self) -> KeysView[str]:
        """Names of the fields."""
        store: dict[str, Any] = self._store
        return store.keys()

    def values(self) -> ValuesView[Any]:
        """Values of the fields."""
        store: dict[str, Any] = self._store
        return store.values()

    def items(self) -> ItemsView[str, Any]:
        """Names and values."""
        store: dict[str, Any] = self._store
        return store.items()

    def toDict(self) -> dict[str, Any]:
        """Names and values, as a dict of its own."""
        return dict(self._store)

    def inputs(self) -> Self:
        """Only the fields that a program is given."""
        kept = {name: self._store[name] for name in self._store if name in self._input_keys}
        return type(self)(kept, list(kept))

    def labels(self) -> Self:
        """Only the other fields."""
        return type(self)({n: v for n, v in self._store.items() if n not in self._input_keys})


class DSPyMetric:
    """A metric of DSPy; see the module.

    It returns a number or a bool, or an object or mapping with `score`; its `feedback`, in words,
    is logged as a column of that name, which `search.type: gepa` shows to who reflects.
    """

    def __init__(self, metric: Any, options: Mapping[str, Any]) -> None:
        """Keep metric and options; a class is made with the options that it takes.

        Raises:
            InputError: it is no metric, or an option is unknown.
        """
        own = {name: options.get(name, default) for name, default in _NAMES.items()}
        for name, field in own.items():
            if not isinstance(field, str) or not field.isidentifier():
                raise InputError(
                    f"option '{name}' is {field!r}; give the name of a field, such as "
                    f"{_NAMES[name]}"
                )
        self._input, self._output = own["input"], own["output"]
        rest = {name: value for name, value in options.items() if name not in own}
        if inspect.isclass(metric):
            _require(rest, metric)
            metric, rest = metric(**rest), {}
        self.metric = metric
        self.user_functions = [metric]
        self._options = rest
        self._absent = _absent(metric, rest)

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        log_extra: Callable[..., None],
        **columns: Any,
    ) -> list[Any]:
        """One value or None per completion."""
        rows = self._rows(prompts, completions, columns)
        return _values([self._call(*row) for row in rows], log_extra)

    def _rows(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
    ) -> list[tuple[Any, Any]]:
        """Example and prediction of each completion."""
        hidden = ("completion_ids", "trainer_state", "log_metric")
        known = {name: column for name, column in columns.items() if name not in hidden}
        if self._input in known:
            raise InputError(
                f"the dataset has a column '{self._input}', which is also the name under which the "
                "metric finds the query; set the option input to another name"
            )
        rows = []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            fields = {name: column[row] for name, column in known.items()}
            turns = [] if isinstance(prompt, str) else prompt[:-1]
            if turns:
                fields[_TURNS] = _made("History", {"messages": turns})
            fields[self._input] = message_text(prompt)
            inputs = [self._input, *([_TURNS] if turns else [])]
            answer = {self._output: message_text(completion)}
            rows.append((_made("Example", fields, inputs), _made("Prediction", answer)))
        return rows

    def _call(self, example: Any, prediction: Any) -> Any:
        return self.metric(example, prediction, *self._absent, **self._options)


class AsyncDSPyMetric(DSPyMetric):
    """`DSPyMetric` for a metric that is a coroutine function."""

    async def __call__(  # type: ignore[override]
        self,
        prompts: list[Any],
        completions: list[Any],
        log_extra: Callable[..., None],
        **columns: Any,
    ) -> list[Any]:
        """One value or None per completion; all calls run together."""
        rows = self._rows(prompts, completions, columns)
        return _values(list(await asyncio.gather(*(self._call(*row) for row in rows))), log_extra)


def make_dspy(metric: Any, options: Mapping[str, Any]) -> RewardFunction:
    """A DSPy metric, async when the function is.

    Raises:
        InputError: see `DSPyMetric`.
    """
    kind = AsyncDSPyMetric if inspect.iscoroutinefunction(metric) else DSPyMetric
    return kind(metric, options)


def _parameters(target: Any) -> Mapping[str, inspect.Parameter] | None:
    """Parameters by name; None where anything may be given, or nothing is known."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None
    kinds = {each.kind for each in parameters.values()}
    return None if inspect.Parameter.VAR_KEYWORD in kinds else parameters


def _require(options: Mapping[str, Any], target: Any) -> None:
    """Refuse options that a function or class does not take."""
    parameters = _parameters(target)
    for name in options:
        if parameters is not None and name not in parameters:
            known = [*_NAMES, *(each for each in parameters if each not in _ABSENT)]
            raise InputError(f"there is no option '{name}'; {choices(name, known)}")


def _absent(metric: Any, options: Mapping[str, Any]) -> tuple[None, ...]:
    """What a metric is given beside example and prediction: None for each trace it insists on.

    Raises:
        InputError: it is no metric, or an option is unknown.
    """
    if not callable(metric):
        raise InputError(
            f"the metric is of type {type(metric).__name__}, which cannot be called; name a "
            "function (example, pred, trace=None)"
        )
    _require(options, metric)
    parameters = _parameters(metric)
    if parameters is None:
        return ()
    asked = [
        each
        for each in list(parameters.values())[2:]
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        and each.default is each.empty
        and each.name not in options
    ]
    absent = (None,) * min(len(asked), len(_ABSENT))
    try:
        inspect.signature(metric).bind(None, None, *absent, **options)
    except TypeError as error:
        raise InputError(
            f"the metric cannot be called as DSPy does, with (example, pred, trace): {error}; "
            "change its parameters, or set its further ones as options"
        ) from error
    return absent


def _made(kind: str, values: Mapping[str, Any], inputs: Sequence[str] = ()) -> Any:
    """An object of DSPy's where the metric's code has loaded it, or one like it."""
    own = getattr(sys.modules.get("dspy"), kind, None)
    if own is None:
        return Fields(values, inputs)
    made = own(**values)
    return made.with_inputs(*inputs) if kind == "Example" else made


def _values(results: Sequence[Any], log_extra: Callable[..., None]) -> list[Any]:
    """The numbers; what was said beside them becomes a column."""
    said = [_part(each, "feedback") for each in results]
    if any(each is not _MISSING for each in said):
        log_extra("feedback", [None if each is _MISSING else each for each in said])
    values = []
    for result in results:
        score = _part(result, "score")
        if score is _MISSING:
            if isinstance(result, Mapping | Fields) or hasattr(result, "toDict"):
                raise InputError(
                    f"the metric returned {quote(str(result))} without 'score'; add it, or "
                    "return a number"
                )
            score = result
        values.append(float(score) if isinstance(score, bool) else score)
    return values


def _part(result: Any, name: str) -> Any:
    """A field of what a metric returned, if it has it."""
    if isinstance(result, Mapping):
        return result.get(name, _MISSING)
    if isinstance(result, int | float) or result is None:
        return _MISSING
    return getattr(result, name, _MISSING)
