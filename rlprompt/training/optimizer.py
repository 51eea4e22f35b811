"""AdamW over the prompt's parameters, its learning rate course, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rlprompt.algorithms.base import OwnParameters
from rlprompt.errors import InputError
from rlprompt.training.settings import OptimizerSettings

DEFAULT_LR_RELATIVE = 0.05


def learning_rate(settings: OptimizerSettings, scale: float) -> float:
    """The peak learning rate.

    Args:
        settings: absolute or relative rate.
        scale: the scale of the prompt's parameters, see `Prompt.scale`.
    """
    if settings.lr is not None:
        return settings.lr
    relative = DEFAULT_LR_RELATIVE if settings.lr_relative is None else settings.lr_relative
    return relative * scale


def lr_factor(
    settings: OptimizerSettings, update: int, total: int, time_share: float = 0.0
) -> float:
    """The share of the peak rate at an update.

    Args:
        settings: schedule, warm-up and floor.
        update: updates made before this one, from 0.
        total: updates of the whole run.
        time_share: the share of the run's time that has been spent, when it is limited.
    """
    if update < settings.warmup_steps:
        return (update + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (update - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    done = min(1.0, max(done, time_share))
    left = 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * left


def build_optimizer(
    parameters: Sequence[nn.Parameter],
    settings: OptimizerSettings,
    peak_lr: float,
    others: Sequence[OwnParameters] = (),
) -> torch.optim.AdamW:
    """AdamW with the prompt's parameters in its first group; each group keeps its `peak_lr`.

    Args:
        parameters: parameters of the prompt.
        settings: settings of AdamW.
        peak_lr: peak learning rate of the prompt.
        others: parameters of the algorithm, with peak rates of their own.

    Raises:
        InputError: there is nothing to train.
    """
    if not parameters:
        raise InputError("the prompt has nothing to train; set prompt.type: soft")
    groups = [OwnParameters(tuple(parameters), peak_lr), *others]
    return torch.optim.AdamW(
        [{"params": list(g.parameters), "lr": g.lr, "peak_lr": g.lr} for g in groups],
        lr=peak_lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        foreach=False,
    )


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> float:
    """Scale gradients to at most `max_norm`; returns the norm before.

    A gradient that is not finite is left as it is, for the guard to report.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return 0.0
    norm = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])))
    if max_norm is not None and math.isfinite(norm) and norm > max_norm:
        for grad in grads:
            grad.mul_(max_norm / (norm + 1e-6))
    return norm


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors `prefix/<parameter>/<name>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}/{index}/{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, values in state.items()
        for name, value in values.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str
) -> None:
    """Take over what `optimizer_tensors` gave; param groups keep their settings."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}/"):
            _, index, name = key.rsplit("/", 2)
            state.setdefault(int(index), {})[name] = value.clone()
    whole = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
