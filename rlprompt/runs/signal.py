"""Whether rewards tell anything: a run that cannot learn must say so.

A policy gradient and a search both learn from how rewards differ. Where no completion could be
scored, or all got the same, a step teaches nothing; a run of such steps ends with an artifact that
looks like any other.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

NoSignal = Literal["unscored", "constant", "flat_groups"]
"""Why a step taught nothing."""

_WHY: Mapping[NoSignal, str] = {
    "unscored": "no reward could score any completion (all were None)",
    "constant": "every completion got one and the same reward",
    "flat_groups": "the completions of each query all got the same reward",
}
_ADVICE: Mapping[NoSignal, str] = {
    "unscored": "look at what the reward returns with `rlprompt reward check`",
    "constant": "look at the reward with `rlprompt reward check`, or draw more varied completions "
    "(sampling.temperature)",
    "flat_groups": "take queries on which the reward differs, a reward with more steps between 0 "
    "and 1, or larger groups",
}
_FIRST_WARNING = 5
"""Steps without a signal in a row before the log says so; said again whenever they double."""


def missing_signal(rewards: Tensor, advantages: Tensor | None = None) -> NoSignal | None:
    """Why a batch cannot teach anything, or None: it can.

    Args:
        rewards: rewards that are learned from, [B], NaN = unknown.
        advantages: what an algorithm made of them, [B] or [B, T]; None for a search.
    """
    known = rewards[~rewards.isnan()]
    if not known.numel():
        return "unscored"
    if known.numel() > 1 and bool((known == known[0]).all()):
        return "constant"
    if advantages is not None and not bool(torch.nan_to_num(advantages).any()):
        return "flat_groups"
    return None


def observe(found: NoSignal | None, state: dict[str, Any], step: int) -> None:
    """Count a step, and warn where steps in a row had no signal.

    Args:
        found: result of `missing_signal`.
        state: what was counted so far, `{}` at first; changed in place, plain values only.
        step: number of finished steps.
    """
    state["steps"] = state.get("steps", 0) + 1
    if found is None:
        state["streak"] = 0
        return
    state["streak"] = state.get("streak", 0) + 1
    state[found] = state.get(found, 0) + 1
    streak, least = state["streak"], _FIRST_WARNING
    while least < streak:
        least *= 2
    if streak == least:
        logger.warning(
            "step %d: nothing to learn from for %d steps in a row: %s; %s",
            step,
            streak,
            _WHY[found],
            _ADVICE[found],
        )


def without_signal(state: Mapping[str, Any]) -> str | None:
    """Why nothing could be learned in any step, as a part of a sentence; None = something could.

    Args:
        state: what `observe` has counted.
    """
    steps = state.get("steps", 0)
    if not steps or steps_without_signal(state) < steps:
        return None
    counts = {kind: state.get(kind, 0) for kind in _WHY}
    most = max(counts, key=lambda kind: counts[kind])
    return f"{_WHY[most]} in all {steps} steps" if steps > 1 else f"{_WHY[most]} in the only step"


def steps_without_signal(state: Mapping[str, Any]) -> int:
    """How many steps could teach nothing.

    Args:
        state: what `observe` has counted.
    """
    return sum(state.get(kind, 0) for kind in _WHY)
