"""The reward of `benchmarks/bench_learning.py`: short completions, nothing else."""

from __future__ import annotations

from typing import Any

FREE_TOKENS = 24


def length_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Minus the tokens over 24, in units of 8: 0 up to 24 tokens, -3 at 48."""
    return [-max(0, len(ids) - FREE_TOKENS) / 8.0 for ids in completion_ids]
