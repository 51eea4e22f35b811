"""KL estimators on distributions small enough to sum over, and the adaptive coefficient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlprompt.algorithms.kl import Estimator, adapted_kl_coef, kl_estimate


def two_policies(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a policy over six tokens, with gradient, and log-probabilities of a reference."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, generator=generator).double().requires_grad_()
    return logits, torch.randn(6, generator=generator).double().log_softmax(0)


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(value, logits)
    return grad


def on_policy_gradient(logits: Tensor, ref: Tensor, estimator: Estimator) -> Tensor:
    """The expected gradient of an estimate as a loss: tokens are drawn, probabilities fixed."""
    logprobs = logits.log_softmax(0)
    return gradient((logprobs.detach().exp() * kl_estimate(logprobs, ref, estimator)).sum(), logits)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_under_samples_of_the_policy(estimator: Estimator) -> None:
    logits, ref = two_policies()
    policy = logits.detach().log_softmax(0)
    exact = (policy.exp() * (policy - ref)).sum()
    expectation = (policy.exp() * kl_estimate(policy, ref, estimator)).sum()
    assert float(expectation) == pytest.approx(float(exact), abs=1e-12)


def test_k2_is_biased() -> None:
    logits, ref = two_policies()
    policy = logits.detach().log_softmax(0)
    exact = (policy.exp() * (policy - ref)).sum()
    expectation = (policy.exp() * kl_estimate(policy, ref, "k2")).sum()
    assert float(expectation) != pytest.approx(float(exact), rel=0.02)


def test_the_gradient_of_k2_is_that_of_the_reverse_kl() -> None:
    logits, ref = two_policies()
    policy = logits.log_softmax(0)
    exact = gradient((policy.exp() * (policy - ref)).sum(), logits)
    found = on_policy_gradient(logits, ref, "k2")
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def test_the_gradient_of_k3_is_that_of_the_forward_kl() -> None:
    logits, ref = two_policies()
    exact = gradient((ref.exp() * (ref - logits.log_softmax(0))).sum(), logits)
    found = on_policy_gradient(logits, ref, "k3")
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def test_the_gradient_of_k1_is_nothing_but_noise() -> None:
    logits, ref = two_policies()
    found = on_policy_gradient(logits, ref, "k1")
    torch.testing.assert_close(found, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_are_zero_only_without_distance(estimator: Estimator) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = -5 * torch.rand(1000, generator=generator)
    ref = -5 * torch.rand(1000, generator=generator)
    distance = kl_estimate(logprobs, ref, estimator)
    assert bool((distance >= 0).all())
    assert kl_estimate(logprobs, logprobs, estimator).tolist() == [0.0] * 1000
    assert bool((distance[(logprobs - ref).abs() > 0.01] > 0).all())


def test_the_coefficient_grows_over_its_target_and_shrinks_under_it() -> None:
    assert adapted_kl_coef(0.1, 6.0, 6.0, 64, 1000) == pytest.approx(0.1)
    assert adapted_kl_coef(0.1, 6.6, 6.0, 100, 1000) == pytest.approx(0.1 * 1.01)
    assert adapted_kl_coef(0.1, 600.0, 6.0, 100, 1000) == pytest.approx(0.1 * 1.02)
    assert adapted_kl_coef(0.1, -5.0, 6.0, 100, 1000) == pytest.approx(0.1 * 0.98)
    assert adapted_kl_coef(0.1, 0.0, 6.0, 10**9, 1) == pytest.approx(0.08)


def test_the_coefficient_settles_where_the_kl_meets_its_target() -> None:
    coef = 1.0
    for _ in range(2000):
        coef = adapted_kl_coef(coef, 3.0 / coef, 6.0, 50, 1000)  # a policy that yields to the KL
    assert 3.0 / coef == pytest.approx(6.0, rel=1e-3)
