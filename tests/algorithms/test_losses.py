"""The clipped surrogate case by case, and k3."""

from __future__ import annotations

import math

import pytest
import torch

from rlprompt.algorithms.losses import clipped_surrogate, kl_k3

LOW, HIGH = 0.2, 0.3

CASES = [
    # ratio, advantage, loss, has gradient, clipped low, clipped high
    (1.0, 2.0, -2.0, True, False, False),
    (1.0, -2.0, 2.0, True, False, False),
    (1.25, 1.0, -1.25, True, False, False),
    (1.5, 1.0, -1.3, False, False, True),
    (1.5, -1.0, 1.5, True, False, False),
    (0.5, 1.0, -0.5, True, False, False),
    (0.5, -1.0, 0.8, False, True, False),
    (0.5, 0.0, 0.0, False, False, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "moves", "low", "high"), CASES)
def test_surrogate_by_cases(
    ratio: float, advantage: float, loss: float, moves: bool, low: bool, high: bool
) -> None:
    old = torch.tensor([[-1.0]])
    logprobs = (old + math.log(ratio)).requires_grad_()
    out = clipped_surrogate(logprobs, old, torch.tensor([[advantage]]), LOW, HIGH)
    assert out.loss.item() == pytest.approx(loss, abs=1e-6)
    assert (out.clipped_low.item(), out.clipped_high.item()) == (low, high)
    out.loss.sum().backward()
    assert logprobs.grad is not None
    expected = -advantage * ratio if moves else 0.0
    assert logprobs.grad.item() == pytest.approx(expected, abs=1e-5)


def test_on_policy_gradient_is_reinforce() -> None:
    logprobs = torch.tensor([[-0.3, -2.0], [-1.0, -0.1]], requires_grad=True)
    advantages = torch.tensor([[1.5], [-0.5]])
    clipped_surrogate(logprobs, logprobs.detach(), advantages, LOW, HIGH).loss.sum().backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -advantages.expand(2, 2))


def test_k3_is_never_negative_and_zero_only_without_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = -5 * torch.rand(1000, generator=generator)
    ref = -5 * torch.rand(1000, generator=generator)
    assert bool((kl_k3(logprobs, ref) >= 0).all())
    assert kl_k3(logprobs, logprobs).tolist() == [0.0] * 1000
    assert bool((kl_k3(logprobs, ref)[(logprobs - ref).abs() > 0.01] > 0).all())


def test_k3_is_unbiased_under_samples_of_the_policy() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(6, generator=generator).double().log_softmax(0)
    ref = torch.randn(6, generator=generator).double().log_softmax(0)
    exact = (policy.exp() * (policy - ref)).sum()
    expectation = (policy.exp() * kl_k3(policy, ref)).sum()
    assert float(expectation) == pytest.approx(float(exact), abs=1e-12)
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=generator)
    estimate = kl_k3(policy[drawn], ref[drawn])
    assert abs(float(estimate.mean() - exact)) < 4 * float(estimate.std()) / 200_000**0.5


def test_k3_gradient_pulls_towards_the_reference() -> None:
    logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
    kl_k3(logprobs, torch.tensor([-2.0, -2.0])).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0] > 0 > logprobs.grad[1]  # minimising lowers the first, raises the second
