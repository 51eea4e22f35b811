"""The report's table of what a search has tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlprompt.runs.read_folder import Row, RunFiles

_MAX_ROWS = 50


def candidate_rows(run: RunFiles) -> list[Row]:
    """The candidates of a search, the most tried first and the better of two before the other.

    A candidate that was dropped early may have the higher mean of fewer completions; how often it
    was tried says how much that means.
    """
    found = run.summary.get("candidates")
    rows = [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []
    return sorted(rows, key=_standing, reverse=True)[:_MAX_ROWS]


def made_by(row: Row) -> str:
    """How a candidate was made, and from which others."""
    parents = ", ".join(str(parent) for parent in row.get("parents") or ())
    origin = str(row.get("origin") or "")
    return f"{origin} of {parents}" if parents else origin


def _standing(row: Row) -> tuple[Any, ...]:
    reward = row.get("reward")
    return row.get("scored") or 0, reward is not None, reward or 0.0
