"""Directions are what they say, and a point is the prompt that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlprompt.prompts.prefix import PrefixPrompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.search.subspace import (
    Subspace,
    embedding_directions,
    flat_parameters,
    orthonormal,
    random_directions,
)
from tests.fixtures.prompts import make
from tests.fixtures.runs import tiny_policy


def gram_schmidt(rows: torch.Tensor) -> torch.Tensor:
    """The slow and obvious version."""
    found: list[torch.Tensor] = []
    for row in rows.double():
        rest = row - sum((each * (each @ row) for each in found), torch.zeros_like(row))
        found.append(rest / rest.norm())
    return torch.stack(found)


def test_directions_are_those_of_gram_schmidt() -> None:
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).double()
    assert torch.allclose(orthonormal(rows), gram_schmidt(rows), atol=1e-10)
    for wrong in (torch.ones(2, 5), torch.zeros(1, 5), torch.randn(6, 5)):
        with pytest.raises(ValueError, match="not independent"):
            orthonormal(wrong)


@pytest.mark.parametrize(("dim", "size"), [(3, 50), (7, 7)])
def test_random_directions_are_a_function_of_the_seed(dim: int, size: int) -> None:
    found = random_directions(dim, size, 4)
    assert torch.allclose(found @ found.T, torch.eye(dim, dtype=torch.float64), atol=1e-12)
    assert torch.equal(found, random_directions(dim, size, 4))
    assert not torch.allclose(found, random_directions(dim, size, 5))


def test_embedding_directions_go_where_embeddings_differ() -> None:
    """Embeddings that differ in two of ten directions, one of them ten times as much."""
    draw = np.random.default_rng(0)
    two = torch.from_numpy(np.linalg.qr(draw.standard_normal((10, 2)))[0])
    table = torch.from_numpy(draw.standard_normal((500, 2)) * [10.0, 1.0]) @ two.T + 3.0
    found = embedding_directions(2, 12, table, 2, 0)
    assert torch.allclose(found @ found.T, torch.eye(2, dtype=torch.float64), atol=1e-10)
    tokens = found.view(2, 12, 10)
    inside = (tokens @ two) @ two.T
    assert torch.allclose(tokens, inside, atol=1e-10)
    shares = (tokens @ two).square().sum((0, 1))
    assert shares[0] > 3.0 * shares[1]


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_a_point_moves_entries_by_its_deviation(kind: str) -> None:
    """In root mean square, whatever the dimension; and every point is a prompt of its own."""
    prompt = make(kind, tiny_policy())
    before = flat_parameters(prompt)
    for dim in (2, 16):
        space = Subspace(prompt, random_directions(dim, len(before), 0), 0.01)
        assert space.dim == dim
        point = torch.ones(dim, dtype=torch.float64) * 0.5
        moved = space.prompt_at(point)
        change = flat_parameters(moved) - before
        assert float(change.square().mean().sqrt()) == pytest.approx(0.005, rel=1e-3)
        again = space.prompt_at(point)
        assert torch.equal(flat_parameters(again), flat_parameters(moved))
        assert again.parameters()[0] is not moved.parameters()[0]
        assert torch.equal(flat_parameters(space.prompt_at(0 * point)), before)
    assert torch.equal(flat_parameters(prompt), before)


def test_a_point_written_out() -> None:
    prompt = SoftPrompt(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    directions = torch.eye(4, dtype=torch.float64)[:2]
    moved = Subspace(prompt, directions, 0.5).prompt_at(torch.tensor([1.0, -2.0]).double())
    step = 0.5 * 2**0.5
    assert isinstance(moved, SoftPrompt)
    expected = [1.0 + step, 2.0 - 2 * step, 3.0, 4.0]
    assert moved.embeddings.flatten().tolist() == pytest.approx(expected)


def test_a_point_stays_within_the_trust_region() -> None:
    start = torch.randn(2, 2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    prompt = PrefixPrompt(start, 1, max_offset=0.5)
    directions = random_directions(3, start.numel(), 0)
    moved = Subspace(prompt, directions, 1.0).prompt_at(torch.full((3,), 40.0).double())
    assert isinstance(moved, PrefixPrompt)
    assert float(moved.metrics()["drift_from_init_max"]) == pytest.approx(0.5)
    soft = SoftPrompt(torch.ones(2, 4), max_norm=2.5)
    far = Subspace(soft, random_directions(3, 8, 0), 1.0).prompt_at(torch.full((3,), 9.0).double())
    assert isinstance(far, SoftPrompt)
    assert float(far.embeddings.detach().norm(dim=1).max()) <= 2.5 + 1e-5
