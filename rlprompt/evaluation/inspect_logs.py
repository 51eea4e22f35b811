"""Logs of Inspect (inspect-ai), read so that two evaluations can be compared sample by sample.

Inspect reports a mean and a standard error per evaluation. Two evaluations of one task met the same
samples, so their difference has a much smaller error: that is what this reads them for. Read is the
JSON form of a log (`inspect eval --log-format json`, or `inspect log convert --to json`); the
package itself is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlprompt.certify.comparison import (
    Difference,
    Interval,
    Scores,
    mean_interval,
    paired_difference,
)
from rlprompt.errors import InputError
from rlprompt.reading import json_text
from rlprompt.reading.files import read_bytes, reason

_LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
"""Inspect's grades (correct, partial, incorrect, no answer) as numbers, as its accuracy counts."""
_MOST_BYTES = 512 * 2**20


@dataclass(frozen=True)
class InspectLog:
    """One evaluation."""

    path: Path
    task: str
    model: str
    values: Mapping[str, Mapping[str, Sequence[float]]]
    """Scorer -> sample's id -> its value in each epoch, NaN where it has none."""


@dataclass(frozen=True)
class ScorerComparison:
    """What one scorer gave in several logs."""

    scorer: str
    means: Sequence[Interval]
    """Of each log."""
    against_first: Sequence[Difference]
    """Each later log minus the first, paired by sample."""


def read_inspect_log(path: Path) -> InspectLog:
    """Read a log.

    Args:
        path: JSON file that Inspect wrote.

    Raises:
        InputError: it cannot be read, is no such log, or holds no samples.
    """
    try:
        content = json_text.loads(read_bytes(path, _MOST_BYTES), lenient=True)
        about, samples = content["eval"], content.get("samples")
        task, model = str(about["task"]), str(about["model"])
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({reason(error)}); name a log") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"'{path}' is not a log of Inspect in JSON ({error}); write one with `inspect log "
            "convert --to json`"
        ) from error
    if not isinstance(samples, list) or not samples:
        raise InputError(f"'{path}' holds no samples, only totals; run Inspect with --log-samples")
    values: dict[str, dict[str, dict[int, float]]] = {}
    try:
        for sample in samples:
            epoch = int(sample.get("epoch", 1))
            for scorer, score in (sample.get("scores") or {}).items():
                for name, value in _numbers(scorer, score["value"]).items():
                    own = values.setdefault(name, {}).setdefault(str(sample["id"]), {})
                    own[epoch] = value
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"'{path}' has a sample that cannot be read ({error}); write the log anew"
        ) from error
    if not values:
        raise InputError(f"'{path}' has no scores; let Inspect score it with `inspect score`")
    plain = {
        name: {id_: [each[e] for e in sorted(each)] for id_, each in own.items()}
        for name, own in values.items()
    }
    return InspectLog(path, task, model, plain)


def compare_inspect_logs(logs: Sequence[InspectLog]) -> list[ScorerComparison]:
    """Hold each later log against the first, sample by sample, scorer by scorer.

    Bounds allow for all comparisons that are made.

    Args:
        logs: logs of one task, at least two.

    Raises:
        InputError: they are of different tasks or samples, or share no scorer.
    """
    first, *others = logs
    for log in others:
        if log.task != first.task:
            raise InputError(
                f"'{first.path}' is of the task {first.task} and '{log.path}' of {log.task}; name "
                "logs of one task"
            )
    names = [name for name in first.values if all(name in log.values for log in others)]
    if not names:
        raise InputError(
            f"'{first.path}' and the others share no scorer; score them alike with `inspect score`"
        )
    found = []
    for name in names:
        ids = list(first.values[name])
        for log in others:
            if log.values[name].keys() != set(ids):
                raise InputError(
                    f"'{first.path}' and '{log.path}' were scored on different samples by {name}; "
                    "evaluate both on the same ones"
                )
        tables = [_table([log.values[name][id_] for id_ in ids]) for log in logs]
        count = len(others) * len(names)
        against = [paired_difference(t, tables[0], num_compared=count) for t in tables[1:]]
        found.append(ScorerComparison(name, [mean_interval(t) for t in tables], against))
    return found


def _numbers(scorer: str, value: Any) -> dict[str, float]:
    """The numbers of a score, which may be a grade, a number, or several by name."""
    if isinstance(value, Mapping):
        return {
            f"{scorer}/{key}": number
            for key, each in value.items()
            for number in _numbers(scorer, each).values()
        }
    if isinstance(value, bool | int | float):
        return {scorer: float(value)}
    if isinstance(value, str):
        if value in _LETTERS:
            return {scorer: _LETTERS[value]}
        lower = value.lower()
        if lower in ("yes", "true", "no", "false"):
            return {scorer: float(lower in ("yes", "true"))}
        try:
            return {scorer: float(value)}
        except ValueError:
            return {scorer: math.nan}
    return {scorer: math.nan}


def _table(rows: Sequence[Sequence[float]]) -> Scores:
    """[Q, n], filled up with NaN where a sample has fewer epochs."""
    width = max(len(row) for row in rows)
    return np.array([[*row, *[math.nan] * (width - len(row))] for row in rows], dtype=np.float64)
