"""A gate: limits that a prompt must keep, checked on bounds and not on point values.

`at_least` must hold for the lower bound of a number and `at_most` for its upper one, so a prompt
passes where the data shows that it keeps the limits, not where it was lucky. All limits must hold,
so no correction for their number is needed: a prompt that breaks one of them passes only if that
one's bound is wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from rlprompt.errors import InputError
from rlprompt.settings import Settings
from rlprompt.suites.schema import read_settings


class Limit(Settings):
    """A limit on the bound of one number, or of all that a pattern names."""

    metric: str = Field(min_length=1)
    """Name of a number in `metrics` of evaluation.json, such as `adherence/reward/minus_base`; `*`
    stands for anything, and then all that match must keep the limit."""
    at_least: float | None = None
    """What the lower bound must reach."""
    at_most: float | None = None
    """What the upper bound must stay within."""
    why: str = ""
    """What the limit is for, in words; it is told with the verdict."""

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("neither at_least nor at_most is given; write one")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(
                f"at_least is {self.at_least} and at_most {self.at_most}, which no number keeps; "
                "exchange them"
            )
        return self


class GateSettings(Settings):
    """A gate."""

    limits: list[Limit] = Field(min_length=1)
    """Limits, all of which must be kept."""


@dataclass(frozen=True)
class Check:
    """Whether a number keeps a limit."""

    metric: str
    passes: bool
    sentence: str
    """The reason in words."""

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def load_gate(path: Path) -> GateSettings:
    """A gate in a YAML file.

    Args:
        path: the file.

    Raises:
        InputError: it cannot be read, or a key or value is wrong.
    """
    return read_settings(path, GateSettings, "gate")


def check(gate: GateSettings, metrics: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    """Hold numbers against a gate.

    Args:
        gate: the gate.
        metrics: numbers with `value`, `low` and `high` by name, of an evaluation.

    Raises:
        InputError: a limit names no number that was measured.
    """
    found: list[Check] = []
    for limit in gate.limits:
        names = [name for name in metrics if fnmatchcase(name, limit.metric)]
        if not names:
            raise InputError(_nothing(limit.metric, list(metrics)))
        for name in names:
            if limit.at_least is not None:
                found.append(_check(name, metrics[name], "low", limit.at_least, limit.why))
            if limit.at_most is not None:
                found.append(_check(name, metrics[name], "high", limit.at_most, limit.why))
    return found


def _check(name: str, number: Mapping[str, Any], side: str, limit: float, why: str) -> Check:
    bound, value = number.get(side), number.get("value")
    word, wanted = ("lower", "at least") if side == "low" else ("upper", "at most")
    behind = f" ({why})" if why else ""
    if value is None:
        return Check(name, False, f"{name} could not be measured, so no bound is known{behind}")
    if bound is None:
        return Check(
            name,
            False,
            f"{name} is {value:.3g}, and {number.get('num_queries', 0)} queries give it no {word} "
            f"bound; ask more queries{behind}",
        )
    passes = bound >= limit if side == "low" else bound <= limit
    verb = "is" if passes else "is not"
    return Check(
        name,
        passes,
        f"the {word} bound of {name} is {bound:.3g} (value {value:.3g}), which {verb} {wanted} "
        f"{limit:g}{behind}",
    )


def _nothing(pattern: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else "see metrics in evaluation.json for the names"
    return f"the gate limits '{pattern}', which this suite did not measure; {hint}"
