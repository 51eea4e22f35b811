"""GRPO's settings, and what its signal and losses are made of; tests/parity compares numbers."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from rlprompt.algorithms.base import BatchView, MicroSignal, TokenLosses
from rlprompt.algorithms.grpo import GRPO, GRPOSettings
from rlprompt.errors import InputError
from rlprompt.policy import TokenScores

LENGTHS = torch.tensor([2, 4, 3, 1])
TERMINATED = torch.tensor([True, False, True, True])


def test_it_says_what_it_needs() -> None:
    plain = GRPO(GRPOSettings(), 8)
    assert (plain.group_size, plain.num_epochs) == (8, 1)
    assert not plain.needs and not plain.entropy_grad
    full = GRPO(GRPOSettings(kl_coef=0.1, entropy_coef=0.1, num_epochs=3, group_size=2), 8)
    assert (full.group_size, full.num_epochs) == (2, 3)
    assert full.needs == {"ref_logprobs"} and full.entropy_grad


@pytest.mark.parametrize(
    "wrong",
    [{"group_size": 1}, {"num_epochs": 0}, {"clip_low": 1.5}, {"kl_coef": -1}, {"beta": 0.1}],
)
def test_settings_refuse_what_makes_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        GRPOSettings.model_validate(wrong)


def test_truncated_completions_stay_in_the_baseline_but_not_in_the_loss() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    settings = GRPOSettings(group_size=2, mask_truncated=True, scale_rewards="none")
    view = BatchView(rewards, LENGTHS, TERMINATED, 2)
    algorithm = GRPO(settings, 8)
    signal = algorithm.signal(view)
    weights = algorithm.token_weights(signal.counted_lengths)
    assert signal.advantages.tolist() == [0.5, -0.5, 0.0, 0.0]
    assert weights.tolist() == pytest.approx([1 / 8, 0.0, 1 / 12, 1 / 4])
    assert signal.metrics == {"frac_reward_zero_std": 0.5}
    everything = GRPO(settings.model_copy(update={"mask_truncated": False}), 8)
    counted = everything.signal(view).counted_lengths
    assert everything.token_weights(counted)[1] == pytest.approx(1 / 16)


def test_a_negative_reward_under_a_mean_is_refused_by_its_setting() -> None:
    algorithm = GRPO(GRPOSettings(group_size=2, scale_rewards="mean"), 8)
    view = BatchView(torch.tensor([1.0, 3.0, 0.0, -0.25]), LENGTHS, TERMINATED, 2)
    with pytest.raises(InputError, match=r"algorithm\.scale_rewards is mean, .*-0\.25.*group"):
        algorithm.signal(view)
    view = BatchView(torch.tensor([1.0, 3.0, 0.0, 0.5]), LENGTHS, TERMINATED, 2)
    assert algorithm.signal(view).advantages.tolist() == [-0.5, 0.5, -1.0, 1.0]


def losses_of(settings: GRPOSettings, old: torch.Tensor | None = None) -> TokenLosses:
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    entropy = torch.tensor([[0.5, 0.7]], requires_grad=True)
    ref = torch.tensor([[-1.5, -2.0]]) if settings.kl_coef else None
    micro = MicroSignal(torch.tensor([[2.0]]), torch.tensor([[0.25, 0.25]]), old, ref)
    scores = TokenScores(logprobs, entropy, torch.ones(1, 2) > 0, torch.empty(2, 0))
    return GRPO(settings, 8).losses(scores, micro)


def test_parts_of_the_loss_appear_only_when_they_have_a_weight() -> None:
    only_rl = losses_of(GRPOSettings())
    assert only_rl.kl is None and only_rl.ce is None and only_rl.value is None
    assert only_rl.total().item() == pytest.approx(-1.0)
    assert only_rl.metrics is not None and "kl" not in only_rl.metrics
    assert not any(value.requires_grad for value in only_rl.metrics.values())

    full = losses_of(GRPOSettings(kl_coef=0.1, entropy_coef=0.2))
    k3 = torch.tensor(-0.5).exp().item() + 0.5 - 1
    assert full.kl is not None and full.kl.item() == pytest.approx(0.1 * 0.25 * k3)
    assert full.ce is not None and full.ce.item() == pytest.approx(-0.2 * 0.25 * 1.2)
    assert full.total().item() == pytest.approx(-1.0 + full.kl.item() + full.ce.item())


def test_total_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no loss"):
        TokenLosses().total()
