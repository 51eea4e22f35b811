"""The value head: what it starts from, what it never touches, and that it can learn."""

from __future__ import annotations

import pytest
import torch

from rlprompt.algorithms.value_head import ValueHead


@pytest.mark.parametrize("hidden_size", [None, 8])
def test_it_starts_at_zero_and_its_input_gets_no_gradient(hidden_size: int | None) -> None:
    head = ValueHead(12, hidden_size, seed=0)
    hidden = torch.randn(3, 5, 12, requires_grad=True)
    values = head(hidden)
    assert values.shape == (3, 5)
    assert values.tolist() == [[0.0] * 5] * 3
    (values - 1).square().sum().backward()
    assert hidden.grad is None
    assert all(p.grad is not None for p in head.outer.parameters())


@pytest.mark.parametrize("scale", [0.01, 1.0, 1000.0])
def test_it_learns_whatever_the_scale_of_the_hidden_states(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 12, generator=generator)
    target = 2.0 + (hidden[:, 0] > 0).float()
    head = ValueHead(12, 16, seed=0)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.02)
    for _ in range(200):
        loss = (head(scale * hidden) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1 * float(target.var())


def test_a_seed_decides_the_parameters_and_nothing_else_does() -> None:
    state = torch.get_rng_state()
    first, again, other = (ValueHead(12, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.inner is not None and again.inner is not None and other.inner is not None
    assert torch.equal(first.inner.weight, again.inner.weight)
    assert not torch.equal(first.inner.weight, other.inner.weight)


def test_its_state_restores_it() -> None:
    first, second = ValueHead(12, 8, seed=1), ValueHead(12, 8, seed=2)
    with torch.no_grad():
        first.outer.weight.normal_()
    second.load_state_dict(first.state_dict())
    hidden = torch.randn(4, 12, dtype=torch.bfloat16)
    assert torch.equal(first(hidden), second(hidden))
    assert first(hidden).dtype == torch.float32
