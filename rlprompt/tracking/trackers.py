"""The trackers that write JSON Lines, to the console, and for TensorBoard.

TensorBoard is imported here only, and only in a run that asks for it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Console

from rlprompt.files import JsonlWriter
from rlprompt.tracking.console import PlainConsole, TrainingDisplay, format_number
from rlprompt.tracking.tracker import (
    Histogram,
    RunInfo,
    Tracker,
    TrackerSettings,
    TrackingSettings,
    evaluation_metrics,
    known_values,
    optional_import,
)


class JsonlTracker(Tracker):
    """Writes `metrics.jsonl`, `completions.jsonl`, `evaluation.jsonl` and `histograms.jsonl`."""

    def __init__(self, settings: TrackerSettings | None = None) -> None:
        super().__init__(settings)
        self._writers: dict[str, JsonlWriter] = {}

    def start(self, run: RunInfo) -> None:
        """Open the files; a resumed run first drops the rows of the steps that it repeats.

        Raises:
            InputError: if a new run finds rows of another one, or a damaged file.
        """
        for kind in ("metrics", "completions", "evaluation", "histograms"):
            path = run.output_dir / f"{kind}.jsonl"
            self._writers[kind] = JsonlWriter(path, run.resume_step)

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append one row with the step, the Unix time and the metrics."""
        own = {"step": step, "time": time.time()}
        self._writers["metrics"].write({**own, **metrics, **own})

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append one row per completion."""
        for row in rows:
            self._writers["completions"].write({"step": step, **row} | {"step": step})

    def log_evaluation(self, step: int, who: str, metrics: Mapping[str, Any]) -> None:
        """Append one row."""
        own = {"step": step, "who": who}
        self._writers["evaluation"].write({**own, **metrics, **own})

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Append one row per histogram."""
        for name, each in histograms.items():
            row = {"step": step, "name": name, "counts": each.counts, "edges": each.edges}
            self._writers["histograms"].write(row)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the files. `summary.json` is the loop's to write."""
        for writer in self._writers.values():
            writer.close()


class ConsoleTracker(Tracker):
    """Shows the run live in a terminal, or as one line per step in a log file."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or PlainConsole()
        self._display: TrainingDisplay | None = None

    @classmethod
    def make(cls, settings: Any, tracking: TrackingSettings, console: Console | None) -> Self:
        """On the console that log lines go to, so that they do not tear the live display."""
        del settings, tracking
        return cls(console)

    def start(self, run: RunInfo) -> None:
        """Put the display on the screen."""
        first_step = max(0, run.resume_step or 0)
        self._display = TrainingDisplay(self._console, run.name, run.steps, first_step)

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Redraw with the metrics of a step."""
        if self._display is not None:
            self._display.show_step(step, metrics)

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show the first completion of the learned prompt."""
        sample = next((row for row in rows if row.get("who", "learned") == "learned"), None)
        if self._display is not None and sample is not None:
            self._display.show_sample(sample)

    def log_evaluation(self, step: int, who: str, metrics: Mapping[str, Any]) -> None:
        """Redraw with a held-out evaluation."""
        if self._display is not None:
            self._display.show_evaluation(step, who, metrics)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Give the terminal back and say in one line what was learned."""
        if self._display is not None:
            self._display.close(_last_line(summary))


class TensorBoardTracker(Tracker):
    """Writes TensorBoard events into `tensorboard/` in the run folder."""

    shows_tables = True

    def __init__(self, settings: TrackerSettings | None = None) -> None:
        super().__init__(settings)
        self._writer: Any = None

    def start(self, run: RunInfo) -> None:
        """Open the event file; a resumed run hides the steps that it repeats.

        Raises:
            InputError: if TensorBoard is not installed.
        """
        module = optional_import("torch.utils.tensorboard", "tensorboard", "tensorboard")
        purge = None if run.resume_step is None else run.resume_step + 1
        self._writer = module.SummaryWriter(str(run.output_dir / "tensorboard"), purge_step=purge)

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Write one scalar per metric that has a value."""
        for key, value in known_values(metrics).items():
            self._writer.add_scalar(key, value, step)

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the first eight completions as text."""
        for index, row in enumerate(rows[:8]):
            text = f"{row.get('query')}\n\n{row.get('completion')}\n\nreward {row.get('reward')}"
            # Markdown shows indented text as it is, whatever a completion contains.
            block = "\n".join(f"    {line}" for line in text.splitlines())
            self._writer.add_text(f"completions/{row.get('split')}/{index}", block, step)

    def log_evaluation(self, step: int, who: str, metrics: Mapping[str, Any]) -> None:
        """Write the evaluation as `eval/{who}/...`."""
        self.log_metrics(step, evaluation_metrics(who, metrics))

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Write the bins as they are."""
        for name, each in histograms.items():
            self._writer.add_histogram_raw(
                name,
                min=each.edges[0],
                max=each.edges[-1],
                num=sum(each.counts),
                sum=each.total,
                sum_squares=each.total_squares,
                bucket_limits=list(each.edges[1:]),
                bucket_counts=list(each.counts),
                global_step=step,
            )

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write what is pending and close the event file."""
        self._writer.close()


def _last_line(summary: Mapping[str, Any]) -> str | None:
    if not summary:
        return None
    parts = [
        f"{label} {format_number(summary[key])}"
        for key, label in (
            ("heldout_reward_before", "before"),
            ("heldout_reward_handwritten", "hand-written"),
            ("heldout_reward_after", "learned"),
        )
        if summary.get(key) is not None
    ]
    ending = (
        f"stopped ({summary.get('stopped_because', 'unknown')}) at {summary.get('steps')} steps"
    )
    return f"{ending}; held-out reward: {', '.join(parts)}" if parts else ending
