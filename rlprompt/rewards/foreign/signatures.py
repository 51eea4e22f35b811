"""Rewards written for other frameworks, unchanged, behind TRL's signature.

    rewards:
      - {path: gsm8k.py:compute_score, adapter: verl}
      - {path: length_rm.py:reward_func, adapter: openrlhf}
      - {path: my_environment.rubric, adapter: verifiers}
      - {path: metrics.py:metric, adapter: dspy}

Interfaces as read in verl 0.9.1, OpenRLHF 0.11.2, verifiers 0.1.14 to 0.3.1 and DSPy 3.4.1. What
OpenRLHF and verifiers do with an exception (log it and go on, or count it as 0.0) is not copied: it
follows `on_error`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlprompt.errors import InputError
from rlprompt.rewards.base import Adapter, RewardFunction
from rlprompt.rewards.foreign.dspy import make_dspy
from rlprompt.rewards.foreign.verifiers import make_verifiers
from rlprompt.rewards.rules.text import message_text

_MISSING = object()


class VerlReward:
    """verl: `compute_score(data_source, solution_str, ground_truth, extra_info, **options)`.

    Called once per completion. It returns a number, or a mapping with "score" whose other entries
    are logged as columns. Dataset columns as in verl's parquet files: `data_source`;
    `ground_truth`, or `reward_model` with that key; `extra_info`, or {}. Options are bound as
    verl's `reward_kwargs` are, and an option may give `data_source` for all rows. A row whose
    ground truth is None cannot be scored.
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        """Keep function and options; the options are checked by the first call."""
        self.function, self.options = function, dict(options)
        self.user_functions = [function]

    def __call__(
        self, completions: list[Any], log_extra: Callable[..., None], **columns: Any
    ) -> list[float | None]:
        """One value or None per completion."""
        rows = [self._arguments(each, columns, row) for row, each in enumerate(completions)]
        results = [None if each is None else self.function(**each) for each in rows]
        return _verl_values(results, log_extra)

    def _arguments(
        self, completion: Any, columns: Mapping[str, Any], row: int
    ) -> dict[str, Any] | None:
        """Keywords of one call; None where the row has no ground truth."""
        truth = _cell(columns, "ground_truth", row)
        if truth is _MISSING:
            model = _cell(columns, "reward_model", row)
            if not isinstance(model, Mapping | None):
                raise InputError(
                    "the dataset has neither a column 'ground_truth' nor 'reward_model' with that "
                    "key, which verl's compute_score needs; add one"
                )
            truth = None if model is None else model.get("ground_truth")
        if truth is None:
            return None
        source = _cell(columns, "data_source", row)
        if source is _MISSING and "data_source" not in self.options:
            raise InputError(
                "the dataset has no column 'data_source', which verl's compute_score needs; add "
                "it, or set the option data_source"
            )
        extra = _cell(columns, "extra_info", row)
        return {
            "data_source": source,
            "solution_str": message_text(completion),
            "ground_truth": truth,
            "extra_info": dict(extra) if isinstance(extra, Mapping) else {},
            **self.options,
        }


class AsyncVerlReward(VerlReward):
    """`VerlReward` for a `compute_score` that is a coroutine function."""

    async def __call__(  # type: ignore[override]
        self, completions: list[Any], log_extra: Callable[..., None], **columns: Any
    ) -> list[float | None]:
        """One value or None per completion; all calls run together."""
        rows = [self._arguments(each, columns, row) for row, each in enumerate(completions)]
        calls = [self.function(**each) for each in rows if each is not None]
        done = iter(await asyncio.gather(*calls))
        return _verl_values([None if each is None else next(done) for each in rows], log_extra)


def _verl_values(results: Sequence[Any], log_extra: Callable[..., None]) -> list[float | None]:
    for result in results:
        if isinstance(result, Mapping) and "score" not in result:
            raise InputError(
                f"compute_score returned a mapping without 'score' (it has {sorted(result)}); "
                f"add it, as verl requires"
            )
    _log_entries([each if isinstance(each, Mapping) else {} for each in results], log_extra)
    return [each["score"] if isinstance(each, Mapping) else each for each in results]


class OpenRLHFReward:
    """OpenRLHF: `reward_func(queries, prompts, labels, **options)`.

    Called as OpenRLHF does, by position and with lists of one: `queries` holds query and completion
    joined, `prompts` the query, `labels` the dataset column `label` or `labels` (None without one).
    OpenRLHF joins token texts under its own template; here the texts of the turns are joined by
    line breaks, without template tokens. It returns the rewards, or a mapping with "rewards", whose
    "extra_logs" become columns; "scores" only filters batches there and is left out.
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        """Keep function and options; the options are checked by the first call."""
        self.function, self.options = function, dict(options)
        self.user_functions = [function]

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        log_extra: Callable[..., None],
        **columns: Any,
    ) -> list[float | None]:
        """One value or None per completion."""
        values: list[float | None] = []
        logs: list[Mapping[str, Any]] = []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            text = _joined(prompt)
            label = _cell(columns, "label", row)
            label = _cell(columns, "labels", row) if label is _MISSING else label
            given = ([f"{text}\n{message_text(completion)}"], [text])
            labels = [None if label is _MISSING else label]
            result = self.function(*given, labels, **self.options)
            entries = result if isinstance(result, Mapping) else {"rewards": result}
            values.append(_single(entries.get("rewards")))
            extra = entries.get("extra_logs") or {}
            logs.append({key: _single(value) for key, value in extra.items()})
        _log_entries(logs, log_extra)
        return values


def make_verl(function: Any, options: Mapping[str, Any]) -> RewardFunction:
    """A verl reward, async when the function is."""
    kind = AsyncVerlReward if inspect.iscoroutinefunction(function) else VerlReward
    return kind(function, options)


ADAPTERS: dict[Adapter, Callable[[Any, Mapping[str, Any]], RewardFunction]] = {
    "verl": make_verl,
    "openrlhf": OpenRLHFReward,
    "verifiers": make_verifiers,
    "dspy": make_dspy,
}
"""Adapters by the name of the framework; "trl" needs none."""


def _cell(columns: Mapping[str, Any], name: str, row: int) -> Any:
    return columns[name][row] if name in columns else _MISSING


def _joined(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message["content"]) for message in prompt)


def _single(value: Any) -> Any:
    """The one element of a list, tensor or array of one; anything else as it is."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple) and len(value) == 1:
        return value[0]
    return value


def _log_entries(rows: Sequence[Mapping[str, Any]], log_extra: Callable[..., None]) -> None:
    for key in dict.fromkeys(key for row in rows for key in row if key != "score"):
        log_extra(key, [row.get(key) for row in rows])
