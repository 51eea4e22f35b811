"""The live view of a run in the terminal, and its plain form in a log file.

A terminal gets one panel that is redrawn in place: progress and time left, the numbers that tell
whether the run is healthy, the history of the reward, one completion to read, and the last
held-out evaluation. Anything else (a CI log, a Slurm output file) gets one plain line per step,
because redrawing fills such a file with escape codes. Completions are hostile text: they never
reach rich as markup and never carry control characters to the terminal.
"""

from __future__ import annotations

import math
import statistics
import time
import unicodedata
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.status import Status
from rich.table import Table
from rich.text import Text

_KEY_METRICS = {
    "reward": "reward",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "grad_norm": "grad norm",
    "step_time": "s/step",
}
WHO = {
    "base": "base",
    "handwritten": "hand-written",
    "best_text": "best text",
    "start": "start",
    "learned": "learned",
}
"""Those whose evaluations are compared, by their name in the files, as a terminal calls them."""
_BLOCKS = tuple(chr(0x2581 + height) for height in range(8))
_ASCII_BLOCKS = tuple("_.-~=+*#")
_HISTORY = 2000


class PlainConsole(Console):
    """The one kind of console here: what it prints is text, whatever stands in it.

    Names, paths, error messages and completions come from anywhere. rich would read `[/y]` in them
    as markup and `:x:` as an emoji, and hand an escape code on to the terminal. So there is no
    markup (styles are set on `Text`), control characters become spaces, and what the encoding of
    the stream cannot express becomes `?`.

    Args:
        stderr: whether it prints to stderr.
        quiet: whether it prints nothing.
        file: the file to print to in place of a standard stream.
    """

    def __init__(
        self, *, stderr: bool = False, quiet: bool = False, file: IO[str] | None = None
    ) -> None:
        super().__init__(
            stderr=stderr, quiet=quiet, file=file, markup=False, emoji=False, highlight=False
        )

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """What a renderable is drawn with, clean."""
        encoding = self.encoding or "utf-8"
        for segment in super().render(renderable, options):
            if segment.control or (segment.text.isascii() and segment.text.isprintable()):
                yield segment
            else:
                lines = (visible(line) for line in segment.text.split("\n"))
                text = "\n".join(lines).encode(encoding, "replace").decode(encoding)
                yield Segment(text, segment.style)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """A line that says what goes on, beside a spinner."""
        shown = Text(status) if isinstance(status, str) else status
        return _PlainStatus(shown, console=self, **options)


class _PlainStatus(Status):
    def update(self, status: RenderableType | None = None, **options: Any) -> None:
        super().update(Text(status) if isinstance(status, str) else status, **options)


class TrainingDisplay:
    """Draws the state of one run; every method redraws once and none starts a thread.

    Args:
        console: Where to draw. A terminal gets the live panel, anything else plain lines.
        name: The name of the run.
        steps: The number of steps of the whole run, at least 1.
        first_step: The steps that are already done, when the run is resumed.
    """

    def __init__(self, console: Console, name: str, steps: int, first_step: int = 0) -> None:
        self._console = console
        self._name = name
        self._steps = steps
        self._step = first_step
        self._started = time.monotonic()
        self._metrics: dict[str, float | None] = {}
        self._rewards: deque[float | None] = deque(maxlen=_HISTORY)
        self._step_times: deque[float] = deque(maxlen=20)
        self._evaluations: dict[str, tuple[int, Mapping[str, Any]]] = {}
        self._sample: Mapping[str, Any] | None = None
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            # Redrawn by us only: a refresh thread would cost cycles and flicker between two steps.
            self._live = Live(self._panel(), console=console, auto_refresh=False)
            self._live.start(refresh=True)
        else:
            self._line(f"{name}: steps {first_step} to {steps}")

    def show_step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Show the metrics of a finished step; `step` counts from 1."""
        self._step = step
        self._metrics = dict(metrics)
        self._rewards.append(metrics.get("reward"))
        seconds = metrics.get("step_time")
        if seconds is not None and math.isfinite(seconds):
            self._step_times.append(seconds)
        if self._live is not None:
            self._draw()
            return
        numbers = [
            f"{label} {format_number(metrics[key])}"
            for key, label in _KEY_METRICS.items()
            if key in metrics
        ]
        self._line(f"step {step}/{self._steps}: {', '.join(numbers)}, left {self._left()}")

    def show_sample(self, row: Mapping[str, Any]) -> None:
        """Show one completion: a row of `completions.jsonl`."""
        self._sample = row
        self._draw()

    def show_evaluation(self, step: int, who: str, metrics: Mapping[str, Any]) -> None:
        """Show a held-out evaluation of `who`: base, handwritten or learned."""
        self._evaluations[who] = (step, metrics)
        if self._live is None:
            split = "test" if metrics.get("split") == "test" else "held-out"
            self._line(f"step {step}/{self._steps}: {split} {_evaluation(who, metrics)}")
        self._draw()

    def close(self, last_line: str | None = None) -> None:
        """Leave the last state on the screen and give the terminal back; twice is fine."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if last_line:
            self._line(last_line)

    def _left(self) -> str:
        if not self._step_times:
            return "-"
        # The median: one slow step (an evaluation, a first compilation) must not move it.
        return format_seconds(statistics.median(self._step_times) * (self._steps - self._step))

    def _line(self, text: str) -> None:
        line = clean_text(text, 400, self._console.encoding)
        self._console.print(Text(line), soft_wrap=True)

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(self._panel(), refresh=True)

    def _panel(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress()]
        if self._metrics:
            parts += [Text(), self._numbers()]
        rows: list[tuple[str, Text]] = []
        if self._rewards:
            rows.append(("reward", self._history()))
        if self._evaluations:
            rows.append(("held-out", self._held_out()))
        if self._sample is not None:
            rows += zip(("query", "answer"), self._sample_texts(self._sample), strict=True)
        if rows:
            grid = Table.grid(padding=(0, 1))
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column()
            for label, text in rows:
                grid.add_row(f" {label}", text)
            parts += [Text(), grid]
        title = Text(clean_text(self._name, 60, self._console.encoding), style="bold")
        return Panel(Group(*parts), title=title, title_align="left", border_style="dim")

    def _progress(self) -> RenderableType:
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=self._steps, completed=self._step)
        elapsed = format_seconds(time.monotonic() - self._started)
        share = f"{self._step / self._steps:4.0%}"
        grid.add_row(
            f"step {self._step}/{self._steps}", bar, f"{share}  {elapsed} < {self._left()} left"
        )
        return grid

    def _numbers(self) -> RenderableType:
        table = Table(box=None, expand=True, padding=(0, 1), header_style="dim")
        values = []
        for key, label in _KEY_METRICS.items():
            table.add_column(label, justify="right", no_wrap=True)
            values.append(Text(format_number(self._metrics.get(key)), style="bold"))
        table.add_row(*values)
        return table

    def _history(self) -> Text:
        unicode = (self._console.encoding or "").lower().startswith("utf")
        width = max(10, self._console.width - 44)
        known = [value for value in self._rewards if value is not None and math.isfinite(value)]
        line = Text(sparkline(self._rewards, width, ascii_only=not unicode), style="cyan")
        if known:
            low, high = format_number(min(known)), format_number(max(known))
            line.append(f"  {low} to {high}", style="dim")
        return line

    def _held_out(self) -> Text:
        line = Text()
        for who in dict.fromkeys([*WHO, *self._evaluations]):
            if who in self._evaluations:
                step, metrics = self._evaluations[who]
                learned = who == "learned"
                line.append("   " if line else "")
                line.append(_evaluation(who, metrics), style="bold" if learned else "")
                line.append(f" (step {step})" if learned else "", style="dim")
        return line

    def _sample_texts(self, row: Mapping[str, Any]) -> tuple[Text, Text]:
        encoding = self._console.encoding
        width = max(40, self._console.width)
        query = Text(clean_text(str(row.get("query", "")), width, encoding))
        answer = Text(clean_text(str(row.get("completion", "")), 3 * width, encoding))
        return query, answer.append(f"  (reward {format_number(row.get('reward'))})", style="dim")


def sparkline(values: Iterable[float | None], width: int = 40, *, ascii_only: bool = False) -> str:
    """Draw values as a row of at most `width` bars, the lowest value lowest.

    Longer histories are averaged into `width` bins of nearly equal size; a bin without a finite
    value is a space. A constant history is drawn at half height.
    """
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    series = list(values)
    count = min(width, len(series))
    bins = [
        _mean(series[index * len(series) // count : (index + 1) * len(series) // count])
        for index in range(count)
    ]
    known = [value for value in bins if value is not None]
    if not known:
        return " " * count
    low, span = min(known), max(known) - min(known)
    top = len(blocks) - 1
    heights = [
        None if value is None else round((value - low) / span * top) if span else top // 2
        for value in bins
    ]
    return "".join(" " if height is None else blocks[height] for height in heights)


def clean_text(text: str, limit: int, encoding: str | None = "utf-8") -> str:
    """Make foreign text safe for one place on a terminal.

    Control, formatting (bidirectional overrides) and surrogate characters and every run of white
    space become one space, what `encoding` cannot express becomes `?`, and at most `limit`
    characters are kept.
    """
    # The bound keeps a megabyte of completion from being walked for one line of it.
    line = " ".join(visible(text[: 4 * limit]).split())
    if len(line) > limit:
        line = line[: max(0, limit - 3)].rstrip() + "..."
    encoding = encoding or "utf-8"
    return line.encode(encoding, "replace").decode(encoding)


def visible(text: str) -> str:
    """A text whose control, formatting (bidirectional) and surrogate characters are spaces."""
    return "".join(
        " " if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else char
        for char in text
    )


def format_number(value: float | None) -> str:
    """Write a number with four significant digits; None and NaN are `-`."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4g}"


def format_seconds(seconds: float | None) -> str:
    """Write a duration as h:mm:ss; None is `-`."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _evaluation(who: str, metrics: Mapping[str, Any]) -> str:
    text = f"{WHO.get(who, who)} {format_number(metrics.get('reward'))}"
    error = metrics.get("reward_sem")
    return text if error is None else f"{text} +- {format_number(error)}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(known) if known else None
