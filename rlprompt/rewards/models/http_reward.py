"""Reward: the values that an HTTP reward server gives."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from rlprompt.errors import InputError
from rlprompt.rewards.base import ReportedError, UnknownTokens
from rlprompt.rewards.models.http_client import HttpSettings, JsonClient, together
from rlprompt.rewards.models.options import SignatureOf
from rlprompt.rewards.rules.text import message_texts


class ServerSettings(HttpSettings):
    """Options of `builtin:http`."""

    protocol: Literal["rlprompt", "openrlhf"] = "rlprompt"
    """What the server speaks: that of `rlprompt reward serve`, or OpenRLHF's remote reward model
    (`{"query": [...], "prompts": [...], "labels": [...]}` to `{"rewards": [...]}`)."""
    columns: tuple[str, ...] = ()
    """Dataset columns that are sent; by default none, so that nothing leaves by accident."""
    label_column: str | None = None
    """Dataset column sent as OpenRLHF's `labels`."""
    batch_size: int | None = Field(default=None, ge=1)
    """Completions per request; null sends the whole batch in one, which a reward that compares the
    completions of a query needs."""


class ServerReward:
    """Asks a reward server; see `ServerSettings` for its options.

    Raises:
        InputError: see `JsonClient`; or an option has no effect under the chosen protocol.
    """

    on_first_rank = True
    """`concurrency` is that of the run: several ranks would ask so often each."""
    __signature__ = SignatureOf(ServerSettings)

    def __init__(self, **options: Any) -> None:
        self.settings = ServerSettings(**options)
        self._client = JsonClient(self.settings)
        openrlhf = self.settings.protocol == "openrlhf"
        useless = "columns" if openrlhf else "label_column"
        if getattr(self.settings, useless):
            raise InputError(
                f"{useless} has no effect with protocol: {self.settings.protocol}; remove it"
            )

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any],
        **kwargs: Any,
    ) -> list[Any]:
        """The server's value per completion.

        Raises:
            ReportedError: it gave no usable answer.
        """
        rows = {"prompts": prompts, "completions": completions}
        if not any(isinstance(ids, UnknownTokens) for ids in completion_ids):
            rows["completion_ids"] = completion_ids
        size = self.settings.batch_size or max(1, len(completions))
        starts = range(0, len(completions), size)
        gate = asyncio.Semaphore(self.settings.concurrency)

        async def ask(start: int) -> Mapping[str, Any]:
            part = slice(start, start + size)
            payload = self._payload({k: v[part] for k, v in rows.items()}, part, kwargs)
            async with gate:
                return self._checked(await self._client.post(payload), len(completions[part]))

        answers = await together(ask(start) for start in starts)
        _log(answers, kwargs)
        return [value for answer in answers for value in answer["rewards"]]

    def _payload(
        self, rows: Mapping[str, Any], part: slice, kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        if self.settings.protocol == "openrlhf":
            prompts, answers = message_texts(rows["prompts"]), message_texts(rows["completions"])
            label = self.settings.label_column
            labels = [None] * len(answers) if label is None else self._column(label, part, kwargs)
            queries = [p + a for p, a in zip(prompts, answers, strict=True)]
            return {"query": queries, "prompts": prompts, "labels": labels}
        state = kwargs.get("trainer_state")
        columns = {name: self._column(name, part, kwargs) for name in self.settings.columns}
        return {
            **{name: list(values) for name, values in rows.items()},
            "columns": columns,
            "step": 0 if state is None else state.global_step,
        }

    def _column(self, name: str, part: slice, kwargs: Mapping[str, Any]) -> list[Any]:
        if name not in kwargs:
            raise InputError(f"the data has no column {name!r} to send; add it or do not name it")
        return list(kwargs[name][part])

    def _checked(self, answer: Any, count: int) -> Mapping[str, Any]:
        values = answer.get("rewards") if isinstance(answer, dict) else None
        shown = self._client.shown
        if not isinstance(values, list):
            raise ReportedError(
                f"got {self._client.quoted(answer)} from {shown}, not a mapping with a list "
                f"'rewards'",
                "check that the url is that of a reward server",
                "values",
            )
        if len(values) != count:
            raise ReportedError(
                f"got {len(values)} values for {count} completions from {shown}",
                "mend the server",
                "values",
            )
        return answer  # type: ignore[no-any-return]


def _log(answers: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any]) -> None:
    """Pass on what the server logged; columns that not every answer holds are left out."""
    log_extra, log_metric = kwargs.get("log_extra"), kwargs.get("log_metric")
    extras = [answer.get("extras") or {} for answer in answers]
    if log_extra is not None and all(isinstance(each, dict) for each in extras) and extras:
        for column in extras[0]:
            columns = [each.get(column) for each in extras]
            if all(
                isinstance(values, list) and len(values) == len(answer["rewards"])
                for values, answer in zip(columns, answers, strict=True)
            ):
                log_extra(column, [value for values in columns for value in values or ()])
    for answer in answers:
        metrics = answer.get("metrics")
        if log_metric is not None and isinstance(metrics, dict):
            for name, value in metrics.items():
                log_metric(name, value)
