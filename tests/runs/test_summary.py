"""The content of summary.json from the counters of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlprompt.runs.standing import validation_verdict
from rlprompt.runs.state import Progress
from rlprompt.runs.stop_reason import FINISHED
from rlprompt.runs.summary import Summary, build_summary, peak_rss_mb
from tests.fixtures.runs import tiny_policy


def summary_of(progress: Progress) -> Summary:
    return build_summary(
        progress,
        tiny_policy(),
        artifact=Path("out/artifact"),
        fingerprint_after="f",
        reason=FINISHED,
        verdict=validation_verdict(progress, "reward"),
    )


def test_rates_and_rewards_come_from_the_counters() -> None:
    progress = Progress(step=3, best_step=2, best_reward=0.5, seconds=9.0, num_tokens=300)
    progress.rollout_seconds = 4.0
    progress.step_seconds = [1.0, 5.0, 3.0]
    progress.heldout = {"base": {"reward": 0.1}, "learned": {"reward": 0.5}}
    summary = summary_of(progress)
    assert summary["completion_tokens_per_second"] == 75.0
    assert summary["step_seconds_median"] == 3.0
    assert (summary["steps"], summary["best_step"], summary["seconds"]) == (3, 2, 9.0)
    assert summary["heldout_reward_before"] == 0.1
    assert summary["heldout_reward_after"] == 0.5
    assert summary["heldout_reward_handwritten"] is None
    assert summary["stopped_because"] == "finished"
    assert summary["base_fingerprint_after"] == "f"
    assert len(summary["base_fingerprint_before"] or "") == 64
    assert {"rlprompt", "python", "torch", "transformers"} <= set(summary["versions"])
    assert summary["machine"]["device"] == "cpu" and summary["machine"]["dtype"] == "float32"


def test_a_run_stopped_before_its_first_step_has_no_rates() -> None:
    summary = summary_of(Progress())
    assert summary["completion_tokens_per_second"] is None
    assert summary["step_seconds_median"] is None
    assert summary["best_step"] == 0


def test_peak_memory_is_in_mebibytes() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc on this system")
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_rss_mb() == pytest.approx(int(peak.split()[1]) / 1024, rel=0.02)
