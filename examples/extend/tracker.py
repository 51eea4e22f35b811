"""A tracker of your own: chosen metrics in a CSV file, one row per step.

A tracker overrides what it wants to hear of. It may fail: after a successful `start` the run goes
on without it, with one warning.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import Any

from pydantic import Field

import rlprompt.extend as rl


class CsvSettings(rl.TrackerSettings):
    """What a recipe may say."""

    file: str = "metrics.csv"
    """Name of the file in the run folder."""
    columns: tuple[str, ...] = Field(default=("reward", "loss"), min_length=1)
    """Metrics to write, by the names that metrics.jsonl has; one without a value stays empty."""


class CsvTracker(rl.Tracker):
    """Writes the file line by line."""

    Settings = CsvSettings
    settings: CsvSettings

    def start(self, run: rl.RunInfo) -> None:
        """Open the file; a resumed run keeps the rows of the steps that it does not repeat."""
        path = run.output_dir / self.settings.file
        kept: list[list[str]] = []
        if run.resume_step is not None and path.exists():
            with path.open(newline="", encoding="utf-8") as before:
                _header, *rows = csv.reader(before)
                kept = [row for row in rows if int(row[0]) <= run.resume_step]
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(["step", *self.settings.columns])
        self._writer.writerows(kept)
        self._file.flush()

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """One row; flushed, so that it is there when the process dies."""
        self._writer.writerow([step, *(metrics.get(name) for name in self.settings.columns)])
        self._file.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the file; `summary` is empty when the run failed."""
        self._file.close()
