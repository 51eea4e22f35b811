"""Shifts: the worst distribution within a radius is one that is really there."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rlprompt.certify.shift import KINDS, Kind, Shift, parse_shift

RADII: dict[Kind, float] = {"tv": 0.05, "ratio": 1.5, "chi2": 0.1, "kl": 0.05}


def divergence(kind: Kind, q: float, p: float) -> float:
    """Of a coin with the rate q from one with the rate p."""
    if kind == "tv":
        return abs(q - p)
    if kind == "ratio":
        return max(q / p, (1 - q) / (1 - p))
    if kind == "chi2":
        return (q - p) ** 2 / (p * (1 - p))
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mean", [0.01, 0.1, 0.4])
def test_the_worst_coin_is_at_the_radius(kind: Kind, mean: float) -> None:
    worst = Shift(kind, RADII[kind]).worst(mean)
    assert mean < worst < 1
    assert divergence(kind, worst, mean) == pytest.approx(RADII[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_no_mean_below_is_worse_and_all_ends_at_one(kind: Kind) -> None:
    shift = Shift(kind, RADII[kind])
    values = [shift.worst(float(m)) for m in np.linspace(0, 1, 201)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    assert values[-1] == 1.0 and max(values) == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [0.07, 0.3, 0.9])
def test_the_base_limit_is_the_inverse(kind: Kind, limit: float) -> None:
    shift = Shift(kind, RADII[kind])
    base = shift.base_limit(limit)
    assert 0 < base < limit
    assert shift.worst(base) == pytest.approx(limit) and shift.worst(base) <= limit


def test_chi_square_holds_for_losses_between_0_and_1() -> None:
    """The worst reweighting of a sample of losses, found by search, is within the formula."""
    losses = np.random.default_rng(0).beta(0.5, 4, 400)
    mean, radius = float(losses.mean()), 0.1
    direction = (losses - mean) / losses.std()

    found = mean
    for scale in np.linspace(0, 1, 500):
        weights = np.maximum(0.0, 1 + scale * direction)
        weights /= weights.mean()
        if ((weights - 1) ** 2).mean() <= radius:
            found = max(found, float((weights * losses).mean()))
    assert mean < found <= Shift("chi2", radius).worst(mean)


def test_what_a_shift_alone_adds_cannot_be_certified() -> None:
    assert Shift("tv", 0.1).base_limit(0.1) == 0.0
    assert Shift("tv", 0.1).base_limit(0.05) == 0.0


def test_no_shift_changes_nothing() -> None:
    for kind, none in (("tv", 0.0), ("ratio", 1.0), ("chi2", 0.0), ("kl", 0.0)):
        assert parse_shift(f"{kind}:{none}").worst(0.2) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "text", ["tv", "tv:", "tv:x", "tv:nan", "tv:-0.1", "tv:2", "ratio:0.5", "chi2:inf", "l2:1", ""]
)
def test_what_is_no_shift_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_shift(text)
