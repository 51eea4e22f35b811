"""The names of a run's own metrics, which what rewards log never takes.

A reward, or the server that stands for it, logs under names of its own choice. A name that the run
uses, in this step or in another, goes below `logged/`: `log_metric("kl", 1.0)` is `logged/kl` in
every record, and no guard, report or resumed run takes it for the run's KL.
"""

from __future__ import annotations

from collections.abc import Mapping

LOGGED = "logged/"
"""Before a name that is the run's own."""

_TAKEN = frozenset(
    {
        "entropy",
        "epoch",
        "frac_reward_zero_std",
        "global_step",
        "grad_norm",
        "kl",
        "kl_coef",
        "learning_rate",
        "loss",
        "lr",
        "max_steps",
        "num_completions",
        "num_tokens",
        "reward",
        "reward_sem",
        "reward_std",
        "rewards",
        "step",
        "step_time",
        "target_logprob",
        "teacher_kl",
        "time",
        "who",
    }
)
_TAKEN_ROOMS = frozenset(
    {
        "augment",
        "clip_ratio",
        "completions",
        "constraint",
        "dynamic_sampling",
        "eval",
        "guards",
        "kl",
        "loss",
        "logps",
        "objective",
        "off_policy",
        "overlap",
        "policy",
        "prompt",
        "rewards",
        "robust",
        "sampling",
        "search",
        "system",
        "test",
        "time",
        "val",
    }
)
"""Taken with all that follows them and a slash."""


def is_taken(name: str) -> bool:
    """Whether a run may use this name for a metric of its own, or a tracker for its own columns."""
    room, slash, _ = name.partition("/")
    return name in _TAKEN or bool(slash and room in _TAKEN_ROOMS) or name.startswith("_")


def metric_name(name: str) -> str:
    """The name in a run's record of a metric that a reward has logged."""
    return LOGGED + name if is_taken(name) else name


def with_logged(own: Mapping[str, float], logged: Mapping[str, float]) -> dict[str, float]:
    """A run's own metrics and what rewards logged, which never replaces one of them."""
    renamed = {(LOGGED + name if name in own else name): value for name, value in logged.items()}
    return {**renamed, **own}
