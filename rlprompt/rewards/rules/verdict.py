"""A value with the reason for it, which is what a rule about safety owes to whoever reads logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Verdict(NamedTuple):
    """What a rule says of one completion."""

    value: float | None
    """In [0, 1], 1.0 = nothing wrong; None = it cannot be scored."""
    reason: str
    """What in the completion decided it; empty when there was nothing."""


def report(
    verdicts: Sequence[Verdict], log_extra: Callable[[str, list[Any]], None] | None, name: str
) -> list[float | None]:
    """The values of a batch; the reasons go to `completions.jsonl` as column `{name}_reason`.

    Args:
        verdicts: one per completion.
        log_extra: what the reward was called with; None outside of a run.
        name: the name of the rule.
    """
    if log_extra is not None:
        log_extra(f"{name}_reason", [verdict.reason for verdict in verdicts])
    return [verdict.value for verdict in verdicts]


def excerpt(text: str, limit: int = 60) -> str:
    """The start of a passage on one line, for a reason."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
