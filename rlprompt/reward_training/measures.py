"""How right and how well calibrated a preference model is: pure functions of numbers.

Letters: n answers or pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

_Z95 = 1.959963984540054
BINS = 10


@dataclass(frozen=True)
class Share:
    """A share with its 95% interval."""

    count: int
    of: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The count through its total; NaN of nothing."""
        return self.count / self.of if self.of else math.nan

    def plain(self) -> dict[str, float | int]:
        """As JSON."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "count": self.count,
            "of": self.of,
        }


def share(hits: Sequence[bool]) -> Share:
    """Share of True with its Wilson score interval (Wilson 1927), which suits small counts."""
    n, k = len(hits), sum(hits)
    if n == 0:
        return Share(0, 0, 0.0, 1.0)
    p, z2 = k / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Share(k, n, max(0.0, centre - half), min(1.0, centre + half))


def brier(probabilities: Sequence[float], outcomes: Sequence[bool]) -> float:
    """Mean squared distance of probability and outcome (Brier 1950); 0.25 for a constant 0.5."""
    pairs = list(zip(probabilities, outcomes, strict=True))
    return sum((p - o) ** 2 for p, o in pairs) / len(pairs) if pairs else math.nan


@dataclass(frozen=True)
class Bin:
    """Predictions of like probability."""

    predicted: float
    """Mean probability."""
    observed: Share
    """How often it came true."""


def reliability(probabilities: Sequence[float], outcomes: Sequence[bool]) -> list[Bin]:
    """Predictions in `BINS` bins of equal width; empty bins are left out."""
    found: dict[int, list[tuple[float, bool]]] = {}
    for p, outcome in zip(probabilities, outcomes, strict=True):
        found.setdefault(min(BINS - 1, int(p * BINS)), []).append((p, outcome))
    return [
        Bin(sum(p for p, _ in rows) / len(rows), share([outcome for _, outcome in rows]))
        for _, rows in sorted(found.items())
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance of predicted and observed over the bins, by count (Guo et al. 2017, eq. 3)."""
    total = sum(each.observed.of for each in bins)
    if not total:
        return math.nan
    gaps = (abs(each.predicted - each.observed.value) * each.observed.of for each in bins)
    return sum(gaps) / total


class McNemar(NamedTuple):
    """What two classifiers differ in on the same rows."""

    only_first: int
    """Rows that only the first got right."""
    only_second: int
    p_value: float
    """Two-sided."""


def exact_mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Compare which rows two classifiers got right.

    The exact binomial form of McNemar's test: under the null each such row is a coin toss.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return McNemar(only_first, only_second, min(1.0, 2 * tail))


def fit_logistic(values: Sequence[float], outcomes: Sequence[bool]) -> tuple[float, float]:
    """(offset, temperature) of P(outcome) = sigmoid((value - offset) / temperature).

    Platt's scaling (1999) with his smoothed targets, which keep it finite when the values separate
    the outcomes. When higher values do not speak for the outcome, the temperature is infinite.
    """
    x = torch.tensor(values, dtype=torch.float64)
    y = torch.tensor(outcomes, dtype=torch.float64)
    good = float(y.sum())
    targets = torch.where(y > 0, (good + 1) / (good + 2), 1 / (len(y) - good + 2))
    scale = float(x.std()) if len(x) > 1 and float(x.std()) > 0 else 1.0
    centre = float(x.mean())
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = weights[0] * (x - centre) / scale + weights[1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        value.backward()
        return value

    optimizer.step(loss)
    slope, bias = (float(each) for each in weights.detach())
    if slope <= 1e-6:
        return centre, math.inf
    return centre - bias * scale / slope, scale / slope


def fit_temperature(margins: Sequence[float]) -> float:
    """The temperature of P(chosen is better) = sigmoid(margin / temperature).

    Minimises the log-loss with Platt's smoothed target, by bisection of its derivative.
    """
    if not margins:
        return 1.0
    target = (len(margins) + 1) / (len(margins) + 2)

    def slope(inverse: float) -> float:
        return sum(m * (_sigmoid(inverse * m) - target) for m in margins)

    low, high = 1e-4, 1e4
    if slope(low) >= 0:
        return math.inf  # margins say nothing, or the opposite
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1.0 / math.sqrt(low * high)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700 else 0.0
