"""What a tracker is, and the rule for those that fail.

The loop hands everything to one `TrackerGroup`. A tracker that cannot start stops the run, because
the user asked for it and nothing has been spent yet; one that fails later is switched off with one
warning, because hours of training are worth more than a curve.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.settings import ChosenSettings, Settings

logger = logging.getLogger(__name__)


_BINS = 32
_RECORD = "jsonl"
"""The tracker that the report and a resumed run read."""


class TrackingSettings(Settings):
    """What trackers are told beside a run's record, and how often."""

    project: str = "rlprompt"
    """Project of the run at Weights & Biases."""
    run_name: str | None = None
    """Name of the run at Weights & Biases; without one, the name of the run itself."""
    group: str | None = None
    """Group of runs that it belongs to at Weights & Biases, such as a sweep."""
    tags: list[str] = Field(default=[])
    """Tags of the run at Weights & Biases."""
    notes: str | None = None
    """What a person should know of the run, shown at Weights & Biases."""
    completions_every: int = Field(default=1, ge=1)
    """Log the training completions of every n-th step; held-out ones are always logged."""
    tables_every: int = Field(default=10, ge=1)
    """Of those, show at Weights & Biases and TensorBoard the ones of every n-th step, which is also
    how often histograms of token norms are logged: each table is a file of its own there."""


@dataclass(frozen=True)
class Histogram:
    """How values are spread."""

    counts: Sequence[int]
    """Values in each of the bins."""
    edges: Sequence[float]
    """One more than bins; a value at an inner edge belongs to the upper bin."""
    total: float
    """Sum of the values."""
    total_squares: float
    """Sum of their squares."""


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
    identity: Mapping[str, str] = field(default_factory=dict)
    """What the run stands on, as hashes: `dataset`, `base`, `chat template`."""
    resume_step: int | None = None
    """None for a new run; else the step of the checkpoint it continues from, or -1 for a run that
    is resumed before its first checkpoint."""


class TrackerSettings(ChosenSettings):
    """What every tracker can be told by itself: nothing but which one it is."""


class Tracker:
    """Takes what a run reports, and does nothing with it: a tracker overrides what it wants.

    It may raise anything at any time, which `TrackerGroup` handles.
    """

    Settings: ClassVar[type[TrackerSettings]] = TrackerSettings
    """What a recipe may say of it."""
    shows_tables: ClassVar[bool] = False
    """Whether it makes a file, or a page of text, of every table of completions."""

    def __init__(self, settings: TrackerSettings | None = None) -> None:
        """Keep the settings.

        Args:
            settings: an instance of the class's `Settings`; None = all at their defaults.
        """
        self.settings = self.Settings() if settings is None else settings

    @classmethod
    def make(cls, settings: Any, tracking: TrackingSettings, console: Console | None) -> Self:
        """The tracker that a recipe describes; override it to take more than the settings.

        Args:
            settings: an instance of the class's `Settings`.
            tracking: what all trackers are told.
            console: the console that log lines go to; None = one of its own.
        """
        del tracking, console
        return cls(settings)

    def start(self, run: RunInfo) -> None:
        """Open whatever is written to. Called once, before anything else."""

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Take the metrics of a finished step, by their final names. Steps count from 1."""

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take completions as rows of `completions.jsonl`, without their step."""

    def log_evaluation(self, step: int, who: str, metrics: Mapping[str, Any]) -> None:
        """Take a held-out evaluation as a row of `evaluation.jsonl`, without step and who.

        `who` is base, handwritten, best_text, start, learned, or text_N of one of the given texts.
        On the test queries the metrics have `split: test`.
        """

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Take histograms, by their final names."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close everything; `summary` is the content of `summary.json`, or empty on a crash."""


class TrackerGroup:
    """Several trackers behind one, with the rule for those that fail.

    Args:
        trackers: The trackers by name; called in this order.
        settings: How often completions, tables and histograms are passed on.

    Attributes:
        lost: For each tracker that failed, how many records it did not take.
    """

    def __init__(
        self, trackers: Mapping[str, Tracker], settings: TrackingSettings | None = None
    ) -> None:
        self.lost: dict[str, int] = {}
        self._trackers = dict(trackers)
        self._settings = settings or TrackingSettings()
        self._running: list[str] = []

    @property
    def names(self) -> list[str]:
        """The trackers by name, in the order in which they are called."""
        return list(self._trackers)

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
        """Pass on completions; those of the split `train` only as often as the settings say."""
        settings = self._settings
        heldout = [row for row in rows if row.get("split") != "train"]
        logged = rows if step % settings.completions_every == 0 else heldout
        shown = logged if step % settings.tables_every == 0 else heldout
        tables = [name for name in self._running if self._trackers[name].shows_tables]
        others = [name for name in self._running if not self._trackers[name].shows_tables]
        for names, chosen in ((others, logged), (tables, shown)):
            if chosen:
                self._each(partial(_log_completions, step=step, rows=chosen), names)

    def log_evaluation(self, step: int, who: str, metrics: Mapping[str, Any]) -> None:
        """Pass on a held-out evaluation."""
        self._each(lambda tracker: tracker.log_evaluation(step, who, metrics))

    def log_histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Pass on how values are spread, every `tables_every` steps.

        Args:
            step: the number of finished steps.
            values: tensors of any shape, by name.
        """
        if step % self._settings.tables_every:
            return
        histograms = {name: histogram(each) for name, each in values.items() if each.numel()}
        self._each(lambda tracker: tracker.log_histograms(step, histograms))

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

    def _each(self, call: Callable[[Tracker], None], names: Sequence[str] | None = None) -> None:
        for name in self._running if names is None else names:
            if name in self.lost:
                self.lost[name] += 1
                continue
            try:
                call(self._trackers[name])
            except Exception as error:
                if name == _RECORD and isinstance(error, OSError):
                    raise  # without its record a run cannot be resumed or reported
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


def _log_completions(tracker: Tracker, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    tracker.log_completions(step, rows)


def histogram(values: Tensor) -> Histogram:
    """Spread values over 32 bins of equal width from the least to the largest finite one."""
    flat = values.detach().flatten().to("cpu", torch.float64)
    flat = flat[flat.isfinite()]
    if not flat.numel():
        return Histogram([0], [0.0, 0.0], 0.0, 0.0)
    low, high = float(flat.min()), float(flat.max())
    high = high if high > low else low + max(1e-6, abs(low) * 1e-6)
    counts = torch.histc(flat, _BINS, low, high)
    edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
    return Histogram(
        [int(count) for count in counts],
        edges.tolist(),
        float(flat.sum()),
        float(flat.square().sum()),
    )


def optional_import(module: str, package: str, extra: str) -> Any:
    """Import what only some trackers need.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"Tracker '{extra}' needs a package that is not installed ({error}); run "
            f"`pip install {package}`, or remove it from 'trackers' in the recipe."
        ) from error


def evaluation_metrics(who: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Flatten a row of `evaluation.jsonl` into `eval/{who}/...`; what has no value is left out.

    Those on the test queries, which are marked with `split: test`, become `test/{who}/...`.
    """
    flat = {key: value for key, value in metrics.items() if not isinstance(value, Mapping)}
    for name, value in (metrics.get("rewards") or {}).items():
        flat[f"rewards/{name}"] = value
    split = "test" if metrics.get("split") == "test" else "eval"
    return {f"{split}/{who}/{key}": value for key, value in known_values(flat).items()}


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
