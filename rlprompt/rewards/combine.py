"""From the values of every reward to one total per completion, and to costs and statistics.

Total of a completion (as in TRL's "sum then normalise"): the sum of weight * value over the `score`
rewards that returned a value; NaN when none did. Then the gates: a completion that a gate vetoes
(value < 0.5) gets min(total, gate_floor), or gate_floor when nothing scored it, so a veto can never
raise a total. A gate that returned None abstains. Constraints and metrics take no part.

Letters: B completions, R rewards with the role `score`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlprompt.rewards.base import GATE_THRESHOLD, RewardSettings


def combine(settings: Sequence[RewardSettings], values: Mapping[str, Tensor]) -> Tensor:
    """The totals [B] of values [B] per reward, NaN = not scored; all NaN without a score."""
    scores = [each for each in settings if each.role == "score"]
    if not scores:  # an algorithm that learns from something else
        return torch.full_like(next(iter(values.values())), torch.nan)
    table = torch.stack([values[each.name] for each in scores])  # [R, B]
    weights = torch.tensor([each.weight for each in scores]).unsqueeze(1)  # [R, 1]
    total = (table * weights).nansum(dim=0)  # [B]
    total[table.isnan().all(dim=0)] = torch.nan
    for gate in (each for each in settings if each.role == "gate"):
        floor = torch.full_like(total, gate.gate_floor)
        # fmin: the floor also replaces NaN, because the veto itself is a verdict
        total = torch.where(_vetoed(values[gate.name]), torch.fmin(total, floor), total)
    return total


def costs(settings: Sequence[RewardSettings], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Per constraint [B]: its values, negated where they must stay above their limit."""
    return {
        each.name: values[each.name] if each.bound == "at_most" else -values[each.name]
        for each in settings
        if each.role == "constraint"
    }


def statistics(
    settings: Sequence[RewardSettings], values: Mapping[str, Tensor]
) -> dict[str, float]:
    """Mean, standard deviation and what the role adds, per reward; nothing over no values."""
    metrics: dict[str, float] = {}
    for each in settings:
        known = values[each.name][~values[each.name].isnan()]
        prefix = f"rewards/{each.name}"
        if known.numel() == 0:
            continue
        mean = known.mean().item()
        metrics[f"{prefix}/mean"] = mean
        if known.numel() > 1:
            metrics[f"{prefix}/std"] = known.std().item()  # with Bessel's correction, as in TRL
        if each.role == "gate":
            metrics[f"{prefix}/veto_rate"] = _vetoed(known).float().mean().item()
        if each.limit is not None:
            over = mean - each.limit
            metrics[f"{prefix}/violation"] = over if each.bound == "at_most" else -over
    return metrics


def _vetoed(values: Tensor) -> Tensor:
    return values < GATE_THRESHOLD  # [B], False for NaN
