"""What a run asks of what learns: a gradient step, or a search.

A run knows steps, checkpoints, evaluations and endings; it knows no gradient, no optimizer and no
candidate. What learns knows how one step changes the prompt, and nothing of the run's life.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from rlprompt.prompts.base import Prompt
from rlprompt.runs.signal import NoSignal


class NotFiniteError(RuntimeError):
    """Loss, gradient or updated prompt is NaN or infinite; the run goes back to a good state."""

    def __init__(self, message: str, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Say what is not finite.

        Args:
            message: the beginning of a sentence, such as "kl is not finite".
            rows: the completions that led to it, as rows of `completions.jsonl`.
        """
        super().__init__(message)
        self.rows = list(rows)


@dataclass(frozen=True)
class StepResult:
    """What one step gives to the run's record."""

    metrics: dict[str, float]
    """By their logged names."""
    rows: Sequence[Mapping[str, Any]]
    """Rows of `completions.jsonl`, one per completion."""
    num_tokens: int
    """Completion tokens drawn."""
    rollout_seconds: float
    """Time spent drawing them, in seconds."""
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds of this step by phase; what no phase claims is logged as `time/other`."""
    no_signal: NoSignal | None = None
    """Why rewards could not teach anything in this step; None = they could, or none are learned
    from."""


@dataclass(frozen=True)
class LearnerState:
    """What a checkpoint keeps of something that learns, or of a prompt that was learned."""

    tensors: Mapping[str, Tensor]
    """Flat names, such as `optimizer/0/exp_avg`."""
    plain: Mapping[str, Any]
    """JSON values, such as the position in the data. JSON has no NaN and no keys but texts."""


def named_under(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `start/`, by the rest of their names."""
    return {
        name.removeprefix(f"{start}/"): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{start}/")
    }


class Learner(Protocol):
    """Makes a prompt better, step by step."""

    @property
    def prompt(self) -> Prompt:
        """The prompt as it is now: what is evaluated, and kept when it is the best so far."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to learn: the run then ends before its last step."""
        ...

    @property
    def tried(self) -> Sequence[Mapping[str, Any]]:
        """Rows about every prompt that was tried, for `summary.json`; empty where there is one."""
        ...

    def step(
        self, step: int, seed: int, *, next_seed: int | None = None, time_share: float = 0.0
    ) -> StepResult:
        """Make one step; `prompt` may be another one afterwards, or the same with other values.

        Args:
            step: the number of finished steps.
            seed: the seed of everything that is drawn in this step.
            next_seed: the seed of the step after this one, for what is drawn ahead; None when there
                is none.
            time_share: the share of the run's time that has been spent, 0 without a limit.

        Raises:
            NotFiniteError: what was learned cannot be used. The run then restores the state before
                the step.
            InputError: a reward failed, or the data cannot be used.
        """
        ...

    def prompt_state(self) -> LearnerState:
        """The present prompt alone, as `restored_prompt` takes it; later steps do not touch it."""
        ...

    def restored_prompt(self, state: LearnerState) -> Prompt:
        """A prompt of its own with the content that `prompt_state` gave.

        Raises:
            ValueError: that was a prompt of another kind or shape.
        """
        ...

    def state(self) -> LearnerState:
        """The state that `restore` takes, with the prompt; later steps do not touch it."""
        ...

    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: names or shapes differ.
            InputError: the data is another.
        """
        ...

    def close(self) -> None:
        """End threads and processes of rollouts and rewards; the learner stays usable."""
        ...
