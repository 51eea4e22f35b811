"""The rows about candidates: sums over steps, and that a checkpoint loses nothing."""

from __future__ import annotations

import json
import math

import pytest

from rlprompt.prompts.text import TextPrompt
from rlprompt.search.base import Candidate
from rlprompt.search.lineage import Lineage
from tests.fixtures.searches import trial

FIRST = Candidate(4, TextPrompt("a"), origin="given")
CHILD = Candidate(7, TextPrompt("b"), (4,), "swap")


def test_a_row_sums_up_all_trials_of_a_candidate() -> None:
    lineage = Lineage()
    lineage.add(trial(FIRST, [[0.5, math.nan]]), 1)
    lineage.add(trial(CHILD, [[math.nan]]), 2)
    lineage.add(trial(FIRST, [[1.0], [0.0]]), 2)
    first, child = lineage.rows
    assert first == {
        "id": 4,
        "parents": [],
        "origin": "given",
        "kind": "text",
        "text": "a",
        "first_step": 1,
        "completions": 4,
        "scored": 3,
        "reward": 0.5,
        "mean_length": 2.0,
    }
    assert (child["parents"], child["origin"], child["first_step"]) == ([4], "swap", 2)
    assert child["reward"] is None and child["scored"] == 0 and child["completions"] == 1
    assert lineage.completions == 5


def test_what_a_checkpoint_keeps_goes_on_and_does_not_follow() -> None:
    lineage = Lineage()
    lineage.add(trial(FIRST, [[1 / 3]]), 1)
    kept = json.loads(json.dumps(lineage.state()))
    in_memory = lineage.state()
    lineage.add(trial(FIRST, [[0.7]]), 2)
    for state in (kept, in_memory):
        again = Lineage(state)
        assert again.completions == 1
        again.add(trial(FIRST, [[0.7]]), 2)
        assert again.rows == lineage.rows
    assert lineage.rows[0]["reward"] == pytest.approx((1 / 3 + 0.7) / 2, abs=1e-7)
