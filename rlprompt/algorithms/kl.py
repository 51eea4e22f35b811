"""The distance to the reference: estimators, penalties, and a coefficient that adapts.

Letters: B completions, T tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
"""Schulman's estimates of KL(policy || reference) from a sampled token."""

STEP_LIMIT = 0.2
"""The largest relative error that `adapted_kl_coef` acts on (Ziegler et al., 2019)."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """An estimate of KL(policy || reference) per token, under samples of the policy.

    http://joschu.net/blog/kl-approx.html. With d = log p - log p_ref:

    - k1 = d: unbiased, either sign.
    - k2 = d^2 / 2: biased, never negative.
    - k3 = exp(-d) - 1 + d: unbiased, never negative.

    As a *loss*, what counts is the gradient, which is another matter. On-policy, that of k2 has the
    gradient of KL(policy || reference) as its expectation; that of k3 has the gradient of
    KL(reference || policy), the same to first order near the reference; that of k1 has expectation
    zero, so k1 belongs into the reward.

    Args:
        logprobs: [B, T] under the policy.
        ref_logprobs: [B, T] under the reference.
        estimator: the estimator, k1, k2 or k3.
    """
    gap = logprobs - ref_logprobs
    if estimator == "k1":
        return gap
    if estimator == "k2":
        return 0.5 * gap.square()
    return torch.exp(-gap) + gap - 1.0


def adapted_kl_coef(
    kl_coef: float, kl: float, target: float, num_completions: int, horizon: float
) -> float:
    """The KL coefficient after a batch (Ziegler et al., 2019, arXiv 1909.08593, section 2.2).

    A proportional controller in log space: with e = kl / target - 1, clipped to +-0.2, the
    coefficient is multiplied by 1 + e * num_completions / horizon, the fraction being at most 1.

    Args:
        kl_coef: the present one, > 0.
        kl: the KL that was measured on the batch, in nats.
        target: the KL that is wanted, in the same unit.
        num_completions: the completions of the batch.
        horizon: completions over which an error of 1 would be acted on in full.
    """
    error = min(max(kl / target - 1.0, -STEP_LIMIT), STEP_LIMIT)
    return kl_coef * (1.0 + error * min(1.0, num_completions / horizon))
