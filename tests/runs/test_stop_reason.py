"""Why runs end: one type, its text in summaries, and what follows from it."""

from __future__ import annotations

import pytest

from rlprompt.runs.stop_reason import (
    EARLY_STOPPING,
    FAILED,
    FINISHED,
    MAX_SECONDS,
    StopReason,
)

REASONS = {
    "finished": FINISHED,
    "early_stopping": EARLY_STOPPING,
    "max_seconds": MAX_SECONDS,
    "guard:too long": StopReason("guard", "too long"),
    "SIGTERM": StopReason("signal", "SIGTERM"),
    "failed": FAILED,
}


@pytest.mark.parametrize("text", REASONS)
def test_a_summary_gives_back_the_reason_that_was_written(text: str) -> None:
    assert str(REASONS[text]) == text
    assert StopReason.parse(text) == REASONS[text]


@pytest.mark.parametrize("text", [None, "", 3, ["finished"]])
def test_a_summary_without_a_reason_has_none(text: object) -> None:
    assert StopReason.parse(text) is None


def test_only_a_signal_or_a_failure_leaves_steps_to_be_made() -> None:
    assert {text for text, reason in REASONS.items() if not reason.is_complete} == {
        "SIGTERM",
        "failed",
    }


def test_exit_codes() -> None:
    codes = {text: reason.exit_code(85) for text, reason in REASONS.items()}
    assert codes == dict.fromkeys(REASONS, 0) | {"SIGTERM": 85, "failed": 1}
    assert REASONS["SIGTERM"].exit_code() == 0
