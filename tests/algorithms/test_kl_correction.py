"""The corrected KL's gradient is that of the exact KL(policy || reference)."""

from __future__ import annotations

import pytest
import torch

from rlprompt.algorithms.base import MicroSignal
from rlprompt.algorithms.grpo import GRPO, GRPOSettings
from rlprompt.algorithms.kl import Estimator
from rlprompt.policy import TokenScores


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_its_gradient_is_that_of_the_reverse_kl(estimator: Estimator) -> None:
    """Over every token of a small vocabulary, weighted by its probability, against autograd."""
    logits = torch.tensor([0.3, -0.7, 1.1, 0.2], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.4, 0.5, 0.6, 0.1], dtype=torch.float64).log_softmax(-1)
    exact = (logits.softmax(-1) * (logits.log_softmax(-1) - reference)).sum()
    (expected,) = torch.autograd.grad(exact, logits)

    logprobs = logits.log_softmax(-1)[:, None]  # four completions of one token
    ones = torch.ones(4, 1, dtype=torch.float64)
    micro = MicroSignal(
        advantages=0.0 * ones,
        weights=logprobs.detach().exp(),  # how often each is drawn
        old_logprobs=None,
        ref_logprobs=reference[:, None],
    )
    settings = GRPOSettings(
        group_size=4, kl_coef=1.0, kl_estimator=estimator, kl_bias_correction=True
    )
    scores = TokenScores(logprobs, 0.0 * ones, ones.bool(), torch.empty(0, 0))
    kl = GRPO(settings, 8).losses(scores, micro).kl
    assert kl is not None
    (found,) = torch.autograd.grad(kl, logits)
    torch.testing.assert_close(found, expected)


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="kl_bias_correction has no effect"):
        GRPOSettings(kl_bias_correction=True)
    with pytest.raises(ValueError, match="kl_bias_correction has no effect with kl_in: reward"):
        GRPOSettings(kl_coef=0.1, kl_in="reward", kl_bias_correction=True)
    with pytest.raises(ValueError, match="k1 has no effect in the loss"):
        GRPOSettings(kl_coef=0.1, kl_estimator="k1")
