"""Reading the metrics of an evaluation; torch is not needed for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def value_of(metrics: Mapping[str, Any], name: str) -> float | None:
    """The mean of one reward in an evaluation's metrics; None where it has none.

    Args:
        metrics: metrics of one evaluation, as a row of `evaluation.jsonl`.
        name: `reward` (the total), or the name of a reward.
    """
    value: float | None = (metrics if name == "reward" else metrics.get("rewards") or {}).get(name)
    return value
