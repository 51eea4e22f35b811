"""What a run has left: the prompt, its metrics, the report, and the folder that holds all of it."""

from __future__ import annotations

import html
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.runs.stop_reason import StopReason
from rlprompt.runs.summary import Summary
from rlprompt.serving.loaded import LoadedPrompt

_REPORT_HEIGHT = 720
"""Pixels of a report that is shown in a notebook."""


@dataclass(frozen=True)
class RunMetrics:
    """The numbers of a run that has come to an end; rewards are held-out means of the total."""

    folder: Path
    """The run folder, where `history` and `evaluations` are read."""
    steps: int
    """Finished steps."""
    seconds: float
    """Wall-clock time of the loop in seconds."""
    stop_reason: StopReason
    """Why the run ended."""
    best_step: int
    """Step whose prompt the artifact holds; 0 = the initial one."""
    learned: float | None
    """Held-out reward of the learned prompt; None without held-out queries or scores."""
    base: float | None
    """Held-out reward of the base without a system message."""
    handwritten: float | None
    """Held-out reward of the hand-written text; None without one."""
    verdict: str
    """What may be said of the learned prompt, in words."""
    is_better: bool | None
    """Whether it is shown to be better than what it began with; None = not measured."""
    heldout: Mapping[str, Mapping[str, Any]] = field(repr=False)
    """All metrics on the validation queries by who was evaluated: `base`, `handwritten`,
    `best_text`, `start`, `learned`."""
    test: Mapping[str, Mapping[str, Any]] = field(repr=False, default_factory=dict)
    """The same on the test queries; empty where they were not met."""

    @classmethod
    def of(cls, summary: Summary, folder: Path) -> RunMetrics:
        """The numbers of a summary.

        Raises:
            InputError: the summary does not say why the run ended.
        """
        reason = StopReason.parse(summary.get("stopped_because"))
        if reason is None:
            raise InputError(f"'{folder / 'summary.json'}' is damaged; run it again")
        return cls(
            folder=folder,
            steps=summary["steps"],
            seconds=summary["seconds"],
            stop_reason=reason,
            best_step=summary["best_step"],
            learned=summary["heldout_reward_after"],
            base=summary["heldout_reward_before"],
            handwritten=summary["heldout_reward_handwritten"],
            verdict=summary["verdict"]["sentence"],
            is_better=summary["learned"],
            heldout=summary["heldout"],
            test=summary.get("test", {}),
        )

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row per step, as `metrics.jsonl` has them; `pandas.DataFrame` takes the list."""
        return _rows(self.folder / "metrics.jsonl")

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """One row per held-out evaluation, as `evaluation.jsonl` has them."""
        return _rows(self.folder / "evaluation.jsonl")


@dataclass(frozen=True)
class Report:
    """The self-contained HTML report of a run; a notebook shows it inline."""

    path: Path

    def _repr_html_(self) -> str:
        """The report in a frame of its own, so that its styles stay there."""
        page = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox width="100%" height="{_REPORT_HEIGHT}" '
            'style="border: 0"></iframe>'
        )


class Outcome(ABC):
    """What is left of one prompt's run, or of a population's."""

    def __init__(self, folder: Path) -> None:
        """Name the run folder; it need not exist."""
        self.folder = folder

    @property
    @abstractmethod
    def prompt(self) -> LoadedPrompt:
        """The learned prompt on its base, ready to answer.

        Raises:
            InputError: the run has left no artifact yet.
        """

    @property
    def summary(self) -> Summary:
        """The content of summary.json.

        Raises:
            InputError: the run has not come to an end, or the file is damaged.
        """
        return read_summary(self.folder)

    @property
    def metrics(self) -> RunMetrics:
        """The numbers of the run, typed.

        Raises:
            InputError: the run has not come to an end, or its summary is damaged.
        """
        return RunMetrics.of(self.summary, self.folder)

    @property
    def report(self) -> Report:
        """The report.

        Raises:
            InputError: the run has left none yet.
        """
        path = self.folder / "report.html"
        if not path.is_file():
            raise InputError(f"'{self.folder}' has no report yet; let the run come to an end")
        return Report(path)

    def _repr_html_(self) -> str:
        """The report, for a notebook."""
        return self.report._repr_html_()


def read_summary(folder: Path) -> Summary:
    """The content of a run folder's summary.json.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / "summary.json"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"'{folder}' has no summary yet; let the run come to an end") from error
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' is damaged ({error}); delete that folder") from error
    if not isinstance(found, dict):
        raise InputError(f"'{path}' is damaged (no JSON object); delete that folder")
    return found  # type: ignore[return-value]  # written by `build_summary`


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(path)) if path.is_file() else []
