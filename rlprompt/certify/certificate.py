"""The claim of a certificate, from counted losses: what a p-value is put together from.

"With probability at least 1 - delta over the sample, the mean loss is at most alpha", for one
prompt fixed before the sample was drawn, or for those of several that pass together. The parts
compose because each is monotone: a shift turns alpha into a lower limit for the sampled
distribution, the worst group and the worst risk are the largest p-value, a judge's errors change
the p-value of a count, and selection compares p-values with a smaller delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from rlprompt.certify.bounds import betting_p_value, binomial_p_value, checked_losses, upper_bound
from rlprompt.certify.judge import JudgedRate, JudgeLabels
from rlprompt.certify.shift import Shift

_TOLERANCE = 1e-6
"""How far a stated bound may lie above the largest mean that is not refuted."""


@dataclass(frozen=True)
class Sample:
    """The losses of one risk of one prompt: one per query, drawn independently."""

    losses: tuple[float, ...]
    """[n] losses in [0, 1], in the order in which the queries were drawn."""
    exact: bool
    """Whether the rule makes every loss 0 or 1; losses are bounded by betting otherwise."""
    groups: tuple[str, ...] | None = None
    """[n] the group of each query; None = there is one."""
    judge: JudgeLabels | None = None
    """How the judge did on labelled answers; None = the losses are the truth."""

    def __post_init__(self) -> None:
        """Refuse losses that do not fit together."""
        values = checked_losses(self.losses)
        if self.groups is not None and len(self.groups) != len(values):
            raise ValueError(f"{len(self.groups)} groups are given for {len(values)} losses")
        if self.exact and not bool(np.isin(values, (0.0, 1.0)).all()):
            raise ValueError("a loss is neither 0 nor 1 although the rule gives nothing else")
        if self.judge is not None and not self.exact:
            raise ValueError("a judge's errors are corrected for verdicts of 0 or 1 only")

    def by_group(self) -> dict[str, tuple[float, ...]]:
        """The losses of each group, in order; one group under "" where none are named."""
        if self.groups is None:
            return {"": self.losses}
        found: dict[str, list[float]] = {}
        for name, loss in zip(self.groups, self.losses, strict=True):
            found.setdefault(name, []).append(loss)
        return {name: tuple(each) for name, each in sorted(found.items())}


class Bound(NamedTuple):
    """What can be said of a mean at some delta."""

    high: float
    """The upper bound under the sampled distribution, of the worst group."""
    worst: float
    """The upper bound under every distribution within the shift."""
    group: str
    """The group that it is the bound of; "" without groups."""


def p_value(sample: Sample, alpha: float, shift: Shift | None = None) -> float:
    """The p-value for "in some group, under some distribution within the shift, the mean is alpha".

    It is the largest over groups (intersection-union): to claim all groups needs no correction for
    their number.

    Args:
        sample: losses of one risk.
        alpha: mean loss that is to be refuted.
        shift: distributions that are meant beside the sampled one; None = that alone.
    """
    limit = alpha if shift is None else shift.base_limit(alpha)
    return max(_p_value(losses, sample, limit) for losses in sample.by_group().values())


def bound(sample: Sample, delta: float, shift: Shift | None = None) -> Bound:
    """The upper bound of the mean, of the worst group, under the worst distribution.

    The largest of the groups' bounds at delta each is right with probability 1 - delta for the
    largest of their means: only the bound of the truly worst group must not fail.

    Args:
        sample: losses of one risk.
        delta: probability with which the bound may be too low.
        shift: the distributions that are meant beside the sampled one; see `p_value`.
    """
    tolerance = _TOLERANCE if sample.judge is None else 1e-4
    highs = {
        name: upper_bound(partial(_p_value, each, sample), delta, tolerance)
        for name, each in sample.by_group().items()
    }
    group = max(highs, key=lambda name: highs[name])
    high = highs[group]
    return Bound(high, high if shift is None else shift.worst(high), group)


def joint_p_value(samples: Sequence[Sample], alpha: float, shift: Shift | None = None) -> float:
    """The p-value for "at least one of the risks is alpha": the largest of theirs.

    Args:
        samples: losses of each risk of one prompt.
        alpha: mean loss that is to be refuted for all of them.
        shift: the distributions that are meant beside the sampled one; see `p_value`.
    """
    return max(p_value(each, alpha, shift) for each in samples)


def _p_value(losses: tuple[float, ...], sample: Sample, limit: float) -> float:
    if limit <= 0.0:
        return 1.0
    if not sample.exact:
        return betting_p_value(losses, limit)
    failures = round(sum(losses))
    if sample.judge is not None:
        return JudgedRate(sample.judge, len(losses)).p_value(failures, limit)
    return float(binomial_p_value(failures, len(losses), limit))
