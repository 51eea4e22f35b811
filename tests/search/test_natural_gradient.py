"""The natural gradient: against formulas written out, and a sampled gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm, sqrtm

from rlprompt.search.natural_gradient import (
    Normal,
    Rates,
    antithetic,
    shape_rate,
    size_rate,
    xnes_update,
)


def test_draws_are_pairs_and_a_function_of_seed_and_generation() -> None:
    draws = antithetic(3, 5, 7, 2)
    assert draws.shape == (6, 5) and torch.equal(draws[0::2], -draws[1::2])
    assert torch.equal(draws, antithetic(3, 5, 7, 2))
    for other in (antithetic(3, 5, 7, 3), antithetic(3, 5, 8, 2)):
        assert not torch.equal(draws, other)
    many = antithetic(20_000, 2, 0, 0)
    assert torch.allclose(many.T @ many / len(many), torch.eye(2).double(), atol=0.03)


def test_the_update_written_out() -> None:
    """Equations 9 to 14 with NumPy and SciPy; B is any root of the new covariance's shape."""
    draw = np.random.default_rng(0)
    dim, count = 3, 6
    root = draw.standard_normal((dim, dim))
    shape = np.real(sqrtm(root @ root.T))
    shape /= np.linalg.det(shape) ** (1 / dim)
    mean, draws = draw.standard_normal(dim), draw.standard_normal((count, dim))
    weights = draw.standard_normal(count)
    weights -= weights.mean()
    old = Normal(torch.from_numpy(mean), 0.7, torch.from_numpy(shape))
    new = xnes_update(old, torch.from_numpy(draws), torch.from_numpy(weights), Rates(0.9, 0.4, 0.3))

    towards = sum(w * z for w, z in zip(weights, draws, strict=True))
    spread = sum(w * (np.outer(z, z) - np.eye(dim)) for w, z in zip(weights, draws, strict=True))
    growth = np.trace(spread) / dim
    turned = spread - growth * np.eye(dim)
    b = shape @ expm(0.3 / 2 * turned)
    assert np.allclose(new.mean.numpy(), mean + 0.9 * 0.7 * shape @ towards)
    assert new.size == pytest.approx(0.7 * math.exp(0.4 / 2 * growth))
    assert np.allclose((new.shape @ new.shape).numpy(), b @ b.T)
    assert torch.allclose(new.shape, new.shape.T)
    assert float(torch.linalg.det(new.shape)) == pytest.approx(1.0)
    assert np.array_equal(old.mean.numpy(), mean) and old.size == 0.7


def test_points_have_the_covariance_of_the_distribution() -> None:
    root = torch.tensor([[2.0, 0.5], [0.5, 0.625]]).double()
    normal = Normal(torch.tensor([1.0, -1.0]).double(), 0.5, root)
    points = normal.points(antithetic(50_000, 2, 1, 0))
    assert torch.allclose(points.mean(0), normal.mean, atol=1e-10)
    covariance = torch.from_numpy(np.cov(points.numpy().T))
    assert torch.allclose(covariance, 0.25 * root @ root, atol=0.03)


def test_without_weights_nothing_moves() -> None:
    old = Normal(torch.ones(4).double(), 0.3, torch.eye(4).double())
    new = xnes_update(old, antithetic(4, 4, 0, 0), torch.zeros(8).double(), Rates(1.0, 0.5, 0.5))
    assert torch.equal(new.mean, old.mean) and new.size == old.size
    assert torch.allclose(new.shape, old.shape)


def test_rates_are_those_of_the_papers() -> None:
    assert size_rate(10) == pytest.approx((3 + math.log(10)) / (5 * math.sqrt(10)))
    assert shape_rate(10) == pytest.approx((9 + 3 * math.log(10)) / (5 * 10 * math.sqrt(10)))
