"""summary.json: the few numbers that a script or a person asks of a finished run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import statistics
import sys
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

import rlprompt
from rlprompt.certify.verdict import Verdict
from rlprompt.prompts.target import Target
from rlprompt.runs.guards import alarms_of
from rlprompt.runs.signal import steps_without_signal
from rlprompt.runs.standing import Tested
from rlprompt.runs.state import Progress
from rlprompt.runs.stop_reason import StopReason

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "pydantic")


class Summary(TypedDict):
    """The content of summary.json. Rewards are held-out means of the total."""

    steps: int
    """Finished steps; of a population, the sum over its members."""
    seconds: float
    """Wall-clock time of the loop in seconds."""
    stopped_because: str
    """A `StopReason` as text."""
    alarms: list[dict[str, Any]]
    """Alarms of the guards, as `Alarm` has them."""
    heldout_reward_before: float | None
    """Of the base; None without held-out queries."""
    heldout_reward_after: float | None
    """Of the learned prompt."""
    heldout_reward_handwritten: float | None
    """Of the hand-written text; None without one."""
    best_step: int
    """Step whose prompt the artifact holds (the last one where nothing was held out)."""
    learned: bool | None
    """Whether the prompt is shown to be better than what it began with; None = not measured."""
    verdict: dict[str, Any]
    """A `Verdict` as plain values; its `sentence` says it in words."""
    num_compared: int
    """Held-out evaluations that the prompt was chosen from, those of other members included."""
    selection: NotRequired[dict[str, Any]]
    """Tests that the prompt was kept by, as `certify.succession` has them; absent where the highest
    mean was kept."""
    steps_without_signal: int
    """Steps in which rewards could teach nothing."""
    heldout: dict[str, Any]
    """Metrics on the validation queries by who was evaluated."""
    completion_tokens_per_second: float | None
    """Of rollouts."""
    step_seconds_median: float | None
    """Median time of a step in seconds."""
    peak_rss_mb: float
    """Peak resident memory of the process in MiB, model loading included."""
    base_fingerprint_before: str | None
    """Hash of the base's weights when it was loaded; None of a model behind an endpoint."""
    base_fingerprint_after: str | None
    """The same when the run ended."""
    artifact: str
    """Folder of the learned prompt."""
    versions: dict[str, str]
    """Versions of Python and of the packages that matter."""
    machine: dict[str, Any]
    """System, cores, threads, device, dtype."""
    ranks: NotRequired[list[dict[str, float | int]]]
    """What each rank held; see `rank_memory`."""
    test: NotRequired[dict[str, Any]]
    """Metrics on the test queries by who was evaluated."""
    tested_steps: NotRequired[list[int]]
    """Steps whose prompts have met the test queries; more than one after a run was extended."""
    candidates: NotRequired[list[dict[str, Any]]]
    """What a search has tried, one row per candidate; see `rlprompt.search.lineage`."""
    member_selection: NotRequired[list[dict[str, Any]]]
    """Tests between the members of a population, where a later one had to be shown to be better."""
    endpoint: NotRequired[dict[str, Any]]
    """What was spent on models behind endpoints; see `rlprompt.endpoints.ledger.Ledger.report`."""
    best_member: NotRequired[str]
    """Member of a population whose artifact is the run's."""
    members: NotRequired[dict[str, dict[str, Any]]]
    """How each member of a population did and why it ended."""


def build_summary(
    progress: Progress,
    target: Target,
    *,
    artifact: Path,
    fingerprint_after: str | None,
    reason: StopReason,
    verdict: Verdict,
    tested: Tested | None = None,
) -> Summary:
    """The content of summary.json.

    Args:
        progress: the run's counters.
        target: the model that the prompt was learned for.
        artifact: folder of the learned prompt.
        fingerprint_after: hash of the base's weights now.
        reason: why the run ended.
        verdict: what may be said of the prompt.
        tested: what the test queries said; None where they were not met.
    """
    heldout = progress.heldout
    rewards = {who: metrics.get("reward") for who, metrics in heldout.items()}
    spent = progress.rollout_seconds
    summary: Summary = {
        "steps": progress.step,
        "seconds": progress.seconds,
        "stopped_because": str(reason),
        "alarms": [alarm._asdict() for alarm in alarms_of(progress.guards)],
        "heldout_reward_before": rewards.get("base"),
        "heldout_reward_after": rewards.get("learned"),
        "heldout_reward_handwritten": rewards.get("handwritten"),
        "best_step": progress.step if progress.best_reward is None else progress.best_step,
        "learned": verdict.learned,
        "verdict": verdict.plain(),
        "num_compared": progress.num_evaluations + progress.num_rivals,
        "steps_without_signal": steps_without_signal(progress.signal),
        "heldout": heldout,
        "completion_tokens_per_second": progress.num_tokens / spent if spent else None,
        "step_seconds_median": (
            statistics.median(progress.step_seconds) if progress.step_seconds else None
        ),
        "peak_rss_mb": peak_rss_mb(),
        "base_fingerprint_before": target.fingerprint,
        "base_fingerprint_after": fingerprint_after,
        "artifact": str(artifact),
        "versions": _versions(),
        "machine": _machine(target),
    }
    if progress.succession:
        summary["selection"] = progress.succession
    if tested is not None:
        summary |= {"test": tested.metrics, "tested_steps": tested.steps}
    return summary


def artifact_metrics(progress: Progress) -> dict[str, Any]:
    """What an artifact says about the run that it came from.

    Args:
        progress: counters of the run, which may still go on.
    """
    rewards = {who: metrics.get("reward") for who, metrics in progress.heldout.items()}
    return {
        "heldout_reward_before": rewards.get("base"),
        "heldout_reward_handwritten": rewards.get("handwritten"),
        "heldout_reward_after": rewards.get("learned"),
        "best_step": progress.step if progress.best_reward is None else progress.best_step,
        "steps": progress.step,
    }


def rank_memory(target: Target) -> dict[str, float | int]:
    """What this rank held: bytes of the base's weights of all there are, and its peak memory."""
    return {**target.memory(), "peak_rss_mb": peak_rss_mb()}


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _versions() -> dict[str, str]:
    known = {"rlprompt": rlprompt.__version__, "python": platform.python_version()}
    return known | {name: importlib.metadata.version(name) for name in _PACKAGES}


def _machine(target: Target) -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **target.machine(),
    }
