"""The trackers: JSON Lines, console, Weights & Biases, TensorBoard.

JSON Lines are always written, because the report reads them. This is the only module that imports
wandb or TensorBoard, and it does so only in a run that asks for them.
"""

from __future__ import annotations

import importlib
import netrc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field
from rich.console import Console

from rlprompt.errors import InputError
from rlprompt.settings import Settings
from rlprompt.training.console import TrainingDisplay, format_number
from rlprompt.training.files import JsonlWriter, write_atomic
from rlprompt.training.tracker import (
    RunInfo,
    Tracker,
    TrackerGroup,
    evaluation_metrics,
    known_values,
)

_COLUMNS = ("split", "who", "query", "completion", "reward", "advantage", "terminated")


class TrackingSettings(Settings):
    """Where a run reports to."""

    trackers: list[Literal["console", "jsonl", "wandb", "tensorboard"]] = Field(
        default=["console", "jsonl"]
    )
    """Where metrics go. `jsonl` is always written, named here or not: the report reads it."""
    project: str = "rlprompt"
    """Project of the run at Weights & Biases."""
    run_name: str | None = None
    """Name of the run at Weights & Biases; without one, the name of the run itself."""
    tags: list[str] = Field(default=[])
    """Tags of the run at Weights & Biases."""
    completions_every: int = Field(default=1, ge=1)
    """Log the training completions of every n-th step; held-out ones are always logged."""


class JsonlTracker:
    """Writes `metrics.jsonl`, `completions.jsonl` and `evaluation.jsonl` into the run folder."""

    def __init__(self) -> None:
        self._writers: dict[str, JsonlWriter] = {}

    def start(self, run: RunInfo) -> None:
        """Open the files; a resumed run first drops the rows of the steps that it repeats.

        Raises:
            InputError: if a new run finds rows of another one, or a damaged file.
        """
        for kind in ("metrics", "completions", "evaluation"):
            path = run.output_dir / f"{kind}.jsonl"
            self._writers[kind] = JsonlWriter(path, run.resume_step)

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append one row with the step, the Unix time and the metrics."""
        self._writers["metrics"].write({"step": step, "time": time.time(), **metrics})

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append one row per completion."""
        for row in rows:
            self._writers["completions"].write({"step": step, **row})

    def log_evaluation(self, step: int, who: str, metrics: Mapping[str, Any]) -> None:
        """Append one row."""
        self._writers["evaluation"].write({"step": step, "who": who, **metrics})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the files. `summary.json` is the loop's to write."""
        for writer in self._writers.values():
            writer.close()


class ConsoleTracker:
    """Shows the run live in a terminal, or as one line per step in a log file."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._display: TrainingDisplay | None = None

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


class WandbTracker:
    """Weights & Biases: offline unless the environment has a key or a mode, and never asks.

    The run id is kept in `wandb_id` in the run folder, so that a resumed run continues its own
    curves. Steps are a metric of their own (`step`), because W&B's counter cannot go back to the
    checkpoint that a run resumes from.
    """

    def __init__(self, settings: TrackingSettings) -> None:
        self._settings = settings
        self._wandb: Any = None
        self._run: Any = None

    def start(self, run: RunInfo) -> None:
        """Open the run.

        Raises:
            InputError: if wandb is not installed, or WANDB_MODE wants a server and no key is set.
        """
        self._wandb = _optional_import("wandb", "wandb", "wandb")
        key_file = run.output_dir / "wandb_id"
        run_id = key_file.read_text() if run.resume_step is not None and key_file.exists() else None
        self._run = self._wandb.init(
            project=self._settings.project,
            name=self._settings.run_name or run.name,
            tags=self._settings.tags,
            dir=str(run.output_dir),
            config={"base": run.base, "recipe": dict(run.recipe)},
            mode=_wandb_mode(),
            id=run_id,
            resume="allow" if run_id else None,
            # Capturing the terminal would fight with the live display for it.
            settings=self._wandb.Settings(console="off", silent=True),
        )
        write_atomic(key_file, str(self._run.id))
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log the metrics that have a value."""
        self._run.log({"step": step, **known_values(metrics)})

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log one table per split."""
        for split in sorted({str(row.get("split")) for row in rows}):
            data = [
                [row.get(column) for column in _COLUMNS]
                for row in rows
                if str(row.get("split")) == split
            ]
            table = self._wandb.Table(columns=list(_COLUMNS), data=data, allow_mixed_types=True)
            self._run.log({"step": step, f"completions/{split}": table})

    def log_evaluation(self, step: int, who: str, metrics: Mapping[str, Any]) -> None:
        """Log the evaluation as `eval/{who}/...`."""
        self._run.log({"step": step, **evaluation_metrics(who, metrics)})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Store the summary and close the run.

        W&B's own process may write its last records after that; it has when this process ends.
        """
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary else 1)


class TensorBoardTracker:
    """Writes TensorBoard events into `tensorboard/` in the run folder."""

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, run: RunInfo) -> None:
        """Open the event file; a resumed run hides the steps that it repeats.

        Raises:
            InputError: if TensorBoard is not installed.
        """
        module = _optional_import("torch.utils.tensorboard", "tensorboard", "tensorboard")
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

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write what is pending and close the event file."""
        self._writer.close()


def build_trackers(settings: TrackingSettings, console: Console | None = None) -> TrackerGroup:
    """Make the trackers that a recipe names, JSON Lines first and always.

    Args:
        settings: The recipe's part.
        console: Shared with the log handler of the command line, so that a log line does not tear
            the live display; None makes one of its own.
    """
    makers: dict[str, Callable[[], Tracker]] = {
        "jsonl": JsonlTracker,
        "wandb": lambda: WandbTracker(settings),
        "tensorboard": TensorBoardTracker,
        # Last, so that no other tracker's start-up message tears the live display.
        "console": lambda: ConsoleTracker(console),
    }
    wanted = {"jsonl", *settings.trackers}
    trackers: dict[str, Tracker] = {name: make() for name, make in makers.items() if name in wanted}
    return TrackerGroup(trackers, settings.completions_every)


def _optional_import(module: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"Tracker '{extra}' needs a package that is not installed ({error}); run "
            f"`pip install {package}`, or remove it from 'trackers' in the recipe."
        ) from error


def _wandb_mode() -> str:
    """Return W&B's mode: WANDB_MODE, else online with a key in the environment, else offline."""
    has_key = bool(os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"))
    mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    # Without a key W&B would stop and ask for one, which no batch job can answer.
    if mode in {"online", "shared"} and not has_key and not _wandb_login():
        raise InputError(
            f"WANDB_MODE is '{mode}' but there is no key for Weights & Biases; set WANDB_API_KEY, "
            "or unset WANDB_MODE to write the run offline."
        )
    return mode


def _wandb_login() -> bool:
    """Say whether `wandb login` was run for the server in use: it leaves an entry in netrc."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


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
