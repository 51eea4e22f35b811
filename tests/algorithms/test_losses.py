"""Ratios, surrogates and the value loss, case by case."""

from __future__ import annotations

import math

import pytest
import torch

from rlprompt.algorithms.losses import (
    Ratio,
    cispo_surrogate,
    clipped_surrogate,
    clipped_value_loss,
    importance_weights,
    log_ratio,
)

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
    ratios = torch.tensor([[math.log(ratio)]]).requires_grad_()
    out = clipped_surrogate(ratios, torch.tensor([[advantage]]), LOW, HIGH)
    assert out.loss.item() == pytest.approx(loss, abs=1e-6)
    assert (out.clipped_low.item(), out.clipped_high.item()) == (low, high)
    out.loss.sum().backward()
    assert ratios.grad is not None
    expected = -advantage * ratio if moves else 0.0
    assert ratios.grad.item() == pytest.approx(expected, abs=1e-5)


def test_cispo_clips_the_weight_and_never_the_gradient() -> None:
    ratios = torch.tensor([[0.1, 1.0, 1.2, 5.0]]).log()
    logprobs = torch.full((1, 4), -0.5, requires_grad=True)
    advantages = torch.tensor([[2.0]])
    out = cispo_surrogate(ratios, logprobs, advantages, HIGH)
    out.loss.sum().backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(-logprobs.grad / 2.0, torch.tensor([[0.1, 1.0, 1.2, 1.3]]))
    assert out.clipped_high.tolist() == [[False, False, False, True]]
    assert not out.clipped_low.any()
    assert not cispo_surrogate(ratios, logprobs, -advantages, HIGH).clipped_high.any()


@pytest.mark.parametrize("level", ["token", "sequence_mean", "sequence_product"])
def test_on_policy_gradient_is_reinforce(level: Ratio) -> None:
    logprobs = torch.tensor([[-0.3, -2.0, -7.0], [-1.0, -0.1, -0.5]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantages = torch.tensor([[1.5], [-0.5]])
    ratios = log_ratio(logprobs, logprobs.detach(), mask, level)
    weights = mask / mask.sum(1, keepdim=True)
    (weights * clipped_surrogate(ratios, advantages, LOW, HIGH).loss).sum().backward()
    assert logprobs.grad is not None
    expected = -advantages * (mask if level == "sequence_product" else weights)
    torch.testing.assert_close(logprobs.grad, expected)


def test_the_padding_takes_no_part_in_a_ratio_of_completions() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, 50.0]])
    old = torch.tensor([[-1.5, -2.5, -50.0]])
    mask = torch.tensor([[True, True, False]])
    assert log_ratio(logprobs, old, mask, "sequence_mean").tolist() == [[0.5] * 3]
    assert log_ratio(logprobs, old, mask, "sequence_product").tolist() == [[1.0] * 3]
    empty = log_ratio(logprobs, old, torch.zeros_like(mask), "sequence_mean")
    assert empty.tolist() == [[0.0] * 3]


VALUE_CASES = [
    # value, old value, return, loss, has gradient
    (1.0, 1.0, 3.0, 2.0, True),
    (1.1, 1.0, 3.0, 0.5 * 1.9**2, True),
    (2.0, 1.0, 3.0, 0.5 * 1.8**2, False),  # it moved too far towards the return
    (0.0, 1.0, 3.0, 0.5 * 3.0**2, True),  # it moved away, and may come back
]


@pytest.mark.parametrize(("value", "old", "target", "loss", "moves"), VALUE_CASES)
def test_value_loss_by_cases(
    value: float, old: float, target: float, loss: float, moves: bool
) -> None:
    values = torch.tensor([[value]], requires_grad=True)
    out = clipped_value_loss(values, torch.tensor([[old]]), torch.tensor([[target]]), 0.2)
    assert out.loss.item() == pytest.approx(loss, abs=1e-6)
    assert out.clipped.item() is not moves
    out.loss.sum().backward()
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(value - target if moves else 0.0, abs=1e-6)
    free = clipped_value_loss(values, torch.zeros(1, 1), torch.tensor([[target]]), None)
    assert free.loss.item() == pytest.approx(0.5 * (value - target) ** 2, abs=1e-6)
    assert not free.clipped.any()


def test_importance_weights_undo_that_another_program_drew_the_tokens() -> None:
    """Under their weights, the gradient over all tokens that one may draw is that of the policy."""
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    there = (logits + 0.3 * torch.arange(5)).log_softmax(0)
    advantages = torch.tensor([[1.0, -2.0, 0.5, 3.0, -1.0]], dtype=torch.float64).t()
    gradients = []
    for drawn in (None, there):
        own = logits.clone().requires_grad_()
        logprobs = own.log_softmax(0)[:, None]  # [B, 1]: each token drawn once
        old = logprobs.detach()
        loss = clipped_surrogate(logprobs - old, advantages, LOW, HIGH).loss
        chance = old.exp()
        if drawn is not None:
            mask = torch.ones(5, 1, dtype=torch.bool)
            weights = importance_weights(old, drawn[:, None], mask, "token", 100.0).weights
            loss, chance = loss * weights, drawn.exp()[:, None]
        (chance * loss).sum().backward()
        assert own.grad is not None
        gradients.append(own.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("ratio", "weights", "cut"),
    [
        ("token", [[1.5, 0.5, 1.0], [1.0, 1.0, 1.5]], [[True, False, False], [False, False, True]]),
        ("sequence_product", [[1.0] * 3, [1.5] * 3], [[False] * 3, [True] * 3]),
        ("sequence_mean", [[1.0] * 3, [1.5] * 3], [[False] * 3, [True] * 3]),
    ],
)
def test_importance_weights_are_about_what_the_ratio_is_about(
    ratio: Ratio, weights: list[list[float]], cut: list[list[bool]]
) -> None:
    old = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]], requires_grad=True)
    drawn = old.detach() - torch.tensor([[2.0, 0.5, 1.0], [1.0, 1.0, 4.0]]).log()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    out = importance_weights(old, drawn, mask, ratio, 1.5)
    torch.testing.assert_close(out.weights, torch.tensor(weights))
    assert out.cut.tolist() == cut
    assert not out.weights.requires_grad
