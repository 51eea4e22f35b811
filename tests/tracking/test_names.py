"""Which names a run keeps for itself."""

from __future__ import annotations

import pytest

from rlprompt.tracking.names import is_taken, metric_name, with_logged


@pytest.mark.parametrize(
    "name",
    [
        "reward",
        "step",
        "kl",
        "loss",
        "guards/hacked",
        "rewards/r/mean",
        "prompt/norm",
        "time/other",
        "_step",
    ],
)
def test_a_name_of_the_runs_own_goes_below_logged(name: str) -> None:
    assert is_taken(name)
    assert metric_name(name) == f"logged/{name}"
    assert not is_taken(metric_name(name))


@pytest.mark.parametrize("name", ["calls", "judge/coverage", "steps", "logged/kl", "rewards", ""])
def test_any_other_name_stays(name: str) -> None:
    assert metric_name(name) == (name if name != "rewards" else "logged/rewards")


def test_what_a_run_has_logged_is_never_replaced() -> None:
    own = {"reward": 0.5, "mine": 1.0}
    both = with_logged(own, {"mine": 9.0, "theirs": 2.0})
    assert both == {"reward": 0.5, "mine": 1.0, "logged/mine": 9.0, "theirs": 2.0}
