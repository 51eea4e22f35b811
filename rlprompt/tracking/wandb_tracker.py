"""Weights & Biases as a tracker; the only module that imports wandb.

What an offline run loses when it is killed (its last seconds) is in `metrics.jsonl`, which is the
record of a run; W&B is a view of it.
"""

from __future__ import annotations

import logging
import netrc
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from rich.console import Console

from rlprompt.errors import InputError
from rlprompt.files import write_atomic
from rlprompt.tracking.tracker import (
    Histogram,
    RunInfo,
    Tracker,
    TrackingSettings,
    evaluation_metrics,
    known_values,
    optional_import,
)

logger = logging.getLogger(__name__)

_COLUMNS = ("split", "who", "query", "completion", "reward", "advantage", "terminated")
_START_SECONDS = 60.0
_FINISH_SECONDS = 300.0
"""How long a server that does not answer may hold a run up; the data is then on disk."""


class WandbTracker(Tracker):
    """Weights & Biases: offline unless the environment has a key or a mode, and never asks.

    The run id is kept in `wandb_id` in the run folder, so that a resumed run continues its own
    curves. Steps are a metric of their own (`step`), because W&B's counter cannot go back to the
    checkpoint that a run resumes from. A new run whose server cannot be reached does not start; one
    that is resumed goes on offline, because a job that was put back has nobody at the keyboard.
    """

    shows_tables = True

    def __init__(self, settings: TrackingSettings) -> None:
        super().__init__()
        self._tracking = settings
        self._wandb: Any = None
        self._run: Any = None
        self._info: RunInfo | None = None
        self._offline = False

    @classmethod
    def make(cls, settings: Any, tracking: TrackingSettings, console: Console | None) -> Self:
        """With project, group, tags and notes of the run."""
        del settings, console
        return cls(tracking)

    def start(self, run: RunInfo) -> None:
        """Open the run.

        Raises:
            InputError: if wandb is not installed, WANDB_MODE wants a server and no key is set, or
                the server of a new run cannot be reached.
        """
        self._wandb = optional_import("wandb", "wandb", "wandb")
        self._info = run
        key_file = run.output_dir / "wandb_id"
        run_id = key_file.read_text() if run.resume_step is not None and key_file.exists() else None
        self._run = self._open(run, _wandb_mode(), run_id)
        self._offline = bool(self._run.settings.mode == "offline")
        write_atomic(key_file, str(self._run.id))
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _open(self, run: RunInfo, mode: str, run_id: str | None) -> Any:
        settings = self._tracking
        arguments: dict[str, Any] = {
            "project": settings.project,
            "name": settings.run_name or run.name,
            "group": settings.group,
            "tags": settings.tags,
            "notes": settings.notes,
            "dir": str(run.output_dir),
            "config": {"base": run.base, "identity": dict(run.identity), "recipe": run.recipe},
            "id": run_id,
            "resume": "allow" if run_id else None,
            # Capturing the terminal would fight with the live display for it.
            "settings": self._wandb.Settings(
                console="off",
                silent=True,
                init_timeout=_START_SECONDS,
                finish_timeout=_FINISH_SECONDS,
            ),
        }
        try:
            return self._wandb.init(mode=mode, **arguments)
        except self._wandb.errors.CommError as error:
            reason = str(error).splitlines()[0]
            if run.resume_step is None:
                raise InputError(
                    f"Weights & Biases cannot be reached ({reason}); set WANDB_MODE=offline to "
                    "write the run to disk, or remove 'wandb' from 'trackers' in the recipe."
                ) from error
            logger.warning("W&B cannot be reached (%s): the run goes on offline.", reason)
            return self._wandb.init(mode="offline", **arguments)

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

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Log the bins as they are."""
        shown = {
            name: self._wandb.Histogram(np_histogram=(list(each.counts), list(each.edges)))
            for name, each in histograms.items()
        }
        self._run.log({"step": step, **shown})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Store summary, artifact and report, and close the run.

        W&B's own process may write its last records after that; it has when this process ends.
        """
        self._run.summary.update(dict(summary))
        try:
            if summary.get("artifact"):
                self._log_artifact(summary)
        finally:
            self._run.finish(exit_code=0 if summary else 1)

    def _log_artifact(self, summary: Mapping[str, Any]) -> None:
        """Log the learned prompt with the report, and what it was made of: base and data."""
        info = self._info
        assert info is not None
        made_of = {
            "base": ("model", {"base": info.base, "fingerprint": info.identity.get("base")}),
            "data": ("dataset", {"fingerprint": info.identity.get("dataset")}),
        }
        for role, (kind, metadata) in made_of.items():
            label = Path(info.base).name if role == "base" else str(metadata["fingerprint"])[:12]
            self._use(self._artifact(f"{role}-{label}", kind, metadata))
        keys = ("steps", "stopped_because", "best_step", "heldout_reward_after")
        artifact = self._artifact(
            info.name,
            "soft_prompt",
            {**{key: summary.get(key) for key in keys}, **info.identity, "base_id": info.base},
        )
        artifact.add_dir(str(summary["artifact"]), name="artifact")
        for name in ("report.html", "recipe.resolved.yaml"):
            if (info.output_dir / name).exists():
                artifact.add_file(str(info.output_dir / name), name=name)
        self._run.log_artifact(artifact, aliases=["latest", f"step-{summary.get('steps')}"])

    def _artifact(self, name: str, kind: str, metadata: Mapping[str, Any]) -> Any:
        plain = re.sub(r"[^\w.-]", "_", name)
        return self._wandb.Artifact(plain, type=kind, metadata=dict(metadata))

    def _use(self, artifact: Any) -> None:
        """Declare an input of the run; the public call does so with a server only."""
        if not self._offline:
            self._run.use_artifact(artifact)
            return
        try:
            self._run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
        except (AttributeError, TypeError) as error:
            logger.warning("this version of wandb keeps no inputs offline (%s)", error)


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


def log_folder(folder: Path, entity: str, project: str, name: str, told: Mapping[str, Any]) -> str:
    """Upload a folder as an artifact of the type `prompt`.

    Args:
        folder: the folder.
        entity: user or team.
        project: project of the entity.
        name: name of the artifact.
        told: what the artifact says of itself.

    Returns:
        `entity/project/name:version`.

    Raises:
        InputError: wandb is not installed.
        Exception: whatever the client raises where the server refuses or cannot be reached.
    """
    wandb = optional_import("wandb", "wandb", "wandb")
    with wandb.init(entity=entity, project=project, job_type="registry") as run:
        artifact = wandb.Artifact(name, type="prompt", metadata=dict(told))
        artifact.add_dir(str(folder))
        logged = run.log_artifact(artifact)
        logged.wait()
        return f"{entity}/{project}/{name}:{logged.version}"


def download_folder(reference: str, folder: Path) -> None:
    """Download an artifact's files.

    Args:
        reference: `entity/project/name:alias`.
        folder: where they go.

    Raises:
        InputError: wandb is not installed.
        Exception: whatever the client raises where the server refuses or cannot be reached.
    """
    wandb = optional_import("wandb", "wandb", "wandb")
    wandb.Api().artifact(reference).download(root=str(folder))
