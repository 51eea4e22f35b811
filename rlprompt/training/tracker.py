"""What a tracker is, and the rule for those that fail.

The loop hands everything to one `TrackerGroup`. A tracker that cannot start stops the run, because
the user asked for it and nothing has been spent yet; one that fails later is switched off with one
warning, because hours of training are worth more than a curve.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from rlprompt.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInfo:
    """What a tracker may know of a run when it starts."""

    name: str
    output_dir: Path
    """The run folder; trackers write below it only."""
    steps: int
    """Number of steps of the whole run, at least 1."""
    base: str
    """Id or path of the base model."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The resolved recipe as plain values."""
    resume_step: int | None = None
    """None for a new run; else the step of the checkpoint it continues from, or -1 for a run that
    is resumed before its first checkpoint."""


class Tracker(Protocol):
    """Takes what a run reports; may raise anything at any time, which `TrackerGroup` handles."""

    def start(self, run: RunInfo) -> None:
        """Open whatever is written to. Called once, before anything else."""

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Take the metrics of a finished step, by their final names. Steps count from 1."""

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take completions as rows of `completions.jsonl`, without their step."""

    def log_evaluation(self, step: int, who: str, metrics: Mapping[str, Any]) -> None:
        """Take a held-out evaluation as a row of `evaluation.jsonl`, without step and who.

        `who` is base, handwritten or learned.
        """

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close everything; `summary` is the content of `summary.json`, or empty on a crash."""


class TrackerGroup:
    """Several trackers behind one, with the rule for those that fail.

    Args:
        trackers: By name; called in this order.
        completions_every: Training completions are passed on at multiples of this step number.

    Attributes:
        lost: For each tracker that failed, how many records it did not take.
    """

    def __init__(self, trackers: Mapping[str, Tracker], completions_every: int = 1) -> None:
        self.lost: dict[str, int] = {}
        self._trackers = dict(trackers)
        self._completions_every = completions_every
        self._running: list[str] = []

    def start(self, run: RunInfo) -> None:
        """Start every tracker.

        Raises:
            InputError: if one cannot start; those that had started are closed again.
        """
        for name, tracker in self._trackers.items():
            try:
                tracker.start(run)
            except Exception as error:
                self.finish({})
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"Tracker '{name}' cannot start ({_first_line(error)}); mend that, or remove "
                    "it from 'trackers' in the recipe."
                ) from error
            self._running.append(name)

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Pass on the metrics of a step."""
        self._each(lambda tracker: tracker.log_metrics(step, metrics))

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Pass on completions; those of the split `train` only every `completions_every` steps."""
        if step % self._completions_every:
            rows = [row for row in rows if row.get("split") != "train"]
        if rows:
            self._each(lambda tracker: tracker.log_completions(step, rows))

    def log_evaluation(self, step: int, who: str, metrics: Mapping[str, Any]) -> None:
        """Pass on a held-out evaluation."""
        self._each(lambda tracker: tracker.log_evaluation(step, who, metrics))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close every tracker that started, failed ones too; calling it again does nothing."""
        running, self._running = self._running, []
        for name in running:
            try:
                self._trackers[name].finish(summary)
            except Exception as error:
                self._record_failure(name, error)
        for name, count in self.lost.items():
            logger.warning("Tracker '%s' failed during the run and lost %d records.", name, count)

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name in self._running:
            if name in self.lost:
                self.lost[name] += 1
                continue
            try:
                call(self._trackers[name])
            except Exception as error:
                self._record_failure(name, error)

    def _record_failure(self, name: str, error: Exception) -> None:
        if name not in self.lost:
            logger.warning(
                "Tracker '%s' failed (%s) and is off for the rest of the run; training goes on.",
                name,
                _first_line(error),
                exc_info=logger.isEnabledFor(logging.DEBUG),
            )
        self.lost[name] = self.lost.get(name, 0) + 1


def evaluation_metrics(who: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Flatten a row of `evaluation.jsonl` into `eval/{who}/...`; what has no value is left out."""
    flat = {key: value for key, value in metrics.items() if not isinstance(value, Mapping)}
    for name, value in (metrics.get("rewards") or {}).items():
        flat[f"rewards/{name}"] = value
    return {f"eval/{who}/{key}": value for key, value in known_values(flat).items()}


def known_values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries that are finite numbers, as floats."""
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, Real) and math.isfinite(value)
    }


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
