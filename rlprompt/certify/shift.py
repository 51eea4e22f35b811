"""What a bound on one distribution says of another that is not far from it.

P is the distribution that the queries were drawn from, Q the one that will be met, and L a loss in
[0, 1]. Each kind of distance gives the largest mean that L can have under Q when its mean under P
is at most u; all are monotone in u, so that a bound that holds with probability 1 - delta under P
gives one under Q that holds with the same probability. The radius is an assumption: nothing in the
data of P can test it. Broken by a Q outside the radius, and by anything that changes what the model
does with the same query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scipy import optimize, special

Kind = Literal["tv", "ratio", "chi2", "kl"]
KINDS: tuple[Kind, ...] = ("tv", "ratio", "chi2", "kl")

_LEAST: dict[Kind, float] = {"tv": 0.0, "ratio": 1.0, "chi2": 0.0, "kl": 0.0}
"""The radius that means no shift at all."""
_WORDS: dict[Kind, str] = {
    "tv": "within total variation {0} of it",
    "ratio": "with a likelihood ratio of at most {0} to it",
    "chi2": "within chi-square divergence {0} of it",
    "kl": "within KL divergence {0} nats of it",
}


@dataclass(frozen=True)
class Shift:
    """All distributions Q within a radius of P."""

    kind: Kind
    """`tv`: TV(P, Q) <= radius; `ratio`: dQ/dP <= radius everywhere; `chi2`: chi2(Q || P) <=
    radius; `kl`: KL(Q || P) <= radius."""
    radius: float

    def __post_init__(self) -> None:
        """Refuse a radius that no pair of distributions has."""
        if self.kind not in KINDS:
            raise ValueError(f"'{self.kind}' is no kind of shift; choose from {', '.join(KINDS)}")
        if not math.isfinite(self.radius) or self.radius < _LEAST[self.kind]:
            raise ValueError(
                f"the radius of {self.kind} is {self.radius:g}; it is at least "
                f"{_LEAST[self.kind]:g}"
            )
        if self.kind == "tv" and self.radius > 1.0:
            raise ValueError(f"total variation is at most 1, not {self.radius:g}; lower it")

    def __str__(self) -> str:
        """The radius in words that go on "the distribution of the queries, and every one"."""
        return _WORDS[self.kind].format(f"{self.radius:g}")

    def worst(self, mean: float) -> float:
        """The largest mean under any Q when the mean under P is at most `mean`.

        Total variation: mean + radius. Ratio G: G mean. Chi-square r: mean + sqrt(r mean (1 -
        mean)), by Cauchy and Schwarz and Var L <= mean (1 - mean), until that reaches 1. KL: the
        largest q with kl(q || mean) <= radius, by the data-processing inequality.

        Args:
            mean: mean under P, or its upper bound.
        """
        if self.kind == "tv":
            return min(1.0, mean + self.radius)
        if self.kind == "ratio":
            return min(1.0, mean * self.radius)
        if self.kind == "chi2":
            if mean * (1.0 + self.radius) >= 1.0:
                return 1.0
            return min(1.0, mean + math.sqrt(self.radius * mean * (1.0 - mean)))
        return _kl_inverse(mean, self.radius)

    def base_limit(self, limit: float) -> float:
        """The largest mean under P for which every Q has at most `limit`; 0 when there is none.

        Args:
            limit: mean under Q that is to be claimed.
        """
        if limit >= 1.0:
            return 1.0
        if self.worst(0.0) >= limit:
            return 0.0
        low, high = 0.0, limit
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self.worst(middle) <= limit else (low, middle)
        return low


def parse_shift(text: str) -> Shift:
    """A shift from `kind:radius`, such as `tv:0.05`.

    Args:
        text: what a user wrote.

    Raises:
        ValueError: it has no such form, or no pair of distributions has that radius.
    """
    kind, colon, number = text.partition(":")
    try:
        radius = float(number)
    except ValueError:
        radius = math.nan
    if kind not in KINDS or not colon or math.isnan(radius):
        raise ValueError(f"'{text}' is no shift; write {', '.join(f'{k}:RADIUS' for k in KINDS)}")
    return Shift(kind, radius)


def _kl_inverse(mean: float, radius: float) -> float:
    if mean <= 0.0 or mean >= 1.0 or radius == 0.0:
        return max(0.0, min(1.0, mean))

    def excess(q: float) -> float:
        return float(special.rel_entr(q, mean) + special.rel_entr(1 - q, 1 - mean)) - radius

    return 1.0 if excess(1.0) <= 0 else float(optimize.brentq(excess, mean, 1.0, xtol=1e-14))
