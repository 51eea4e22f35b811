"""Learning rate, its course, and gradient clipping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from rlprompt.errors import InputError
from rlprompt.training.optimizer import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    lr_factor,
)
from rlprompt.training.settings import OptimizerSettings, TrainingSettings


def test_a_relative_rate_follows_the_base() -> None:
    assert learning_rate(OptimizerSettings(), 0.2) == pytest.approx(0.01)
    assert learning_rate(OptimizerSettings(lr_relative=0.5), 0.2) == pytest.approx(0.1)
    assert learning_rate(OptimizerSettings(lr=0.03), 0.2) == 0.03


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"lr": 0.1, "lr_relative": 0.1}, "keep one"),
        ({"schedule": "constant", "min_lr_ratio": 0.5}, "no effect"),
        ({"lr": 0.0}, "greater than 0"),
        ({"betas": [0.9, 1.0]}, "less than 1"),
        ({"max_grad_norm": 0}, "greater than 0"),
        ({"momentum": 0.9}, "not permitted"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        OptimizerSettings.model_validate(wrong)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"token_budget": 8}, {"save_every": 0}])
def test_training_settings_have_bounds(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        TrainingSettings.model_validate(wrong)


def course(total: int, **changes: Any) -> list[float]:
    settings = OptimizerSettings(**changes)
    return [lr_factor(settings, update, total) for update in range(total)]


def test_schedules() -> None:
    assert course(5, schedule="constant") == [1.0] * 5
    linear = course(4, schedule="linear", min_lr_ratio=0.2)
    assert linear == pytest.approx([1.0, 0.8, 0.6, 0.4])
    cosine = course(100, schedule="cosine", min_lr_ratio=0.1)
    assert cosine[0] == 1.0 and cosine[50] == pytest.approx(0.55)
    assert cosine == sorted(cosine, reverse=True)
    assert 0.1 < cosine[-1] < 0.101


def test_warm_up_rises_to_the_peak_and_the_schedule_follows() -> None:
    rates = course(8, schedule="linear", min_lr_ratio=0.0, warmup_steps=4)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_updates_after_the_end_stay_at_the_floor() -> None:
    settings = OptimizerSettings(min_lr_ratio=0.3)
    assert lr_factor(settings, 10, 10) == lr_factor(settings, 99, 10) == pytest.approx(0.3)


def test_the_optimizer_takes_the_settings() -> None:
    parameter = nn.Parameter(torch.ones(3))
    settings = OptimizerSettings(betas=(0.5, 0.6), eps=1e-6, weight_decay=0.1)
    (group,) = build_optimizer([parameter], settings, 0.02).param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.5, 0.6), 1e-6)
    assert group["weight_decay"] == 0.1
    with pytest.raises(InputError, match="nothing to train"):
        build_optimizer([], settings, 0.1)


def test_clipping_scales_all_gradients_together() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter()]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, None) == 5.0
    assert clip_gradients(parameters, 10.0) == 5.0
    assert parameters[1].grad.item() == 4.0
    assert clip_gradients(parameters, 1.0) == 5.0
    assert clip_gradients(parameters, None) == pytest.approx(1.0, abs=1e-5)
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.0], abs=1e-5)


def test_clipping_leaves_what_is_not_finite_to_the_guard() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([math.inf, 1.0])
    assert clip_gradients([parameter], 1.0) == math.inf
    assert parameter.grad.tolist() == [math.inf, 1.0]
    assert clip_gradients([nn.Parameter()], 1.0) == 0.0
