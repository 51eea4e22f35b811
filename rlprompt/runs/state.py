"""What changes while a run goes on, and how it goes into a checkpoint and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlprompt.errors import InputError, describe_error
from rlprompt.prompts.base import Prompt
from rlprompt.random_state import global_random_state, restore_global_random_state
from rlprompt.runs.checkpoint import Checkpoint
from rlprompt.runs.learner import Learner, LearnerState, named_under

PlainScores = list[list[float | None]]
"""[Q][n] values of held-out completions by query, None = unknown."""


@dataclass
class Progress:
    """Counters of a run; plain values."""

    step: int = 0
    """Finished steps."""
    best_step: int = 0
    """Step whose prompt did best on held-out queries."""
    best_reward: float | None = None
    """Its held-out reward."""
    stale_evaluations: int = 0
    """Evaluations since then."""
    evaluated_step: int = -1
    """Step of the last held-out evaluation of the prompt; -1 = none yet."""
    extent: list[int | None] = field(default_factory=list)
    """How far the run was to go, as `runs.changes.extent` has it; empty before it began."""
    seconds: float = 0.0
    """Time spent, summed over resumed parts."""
    num_tokens: int = 0
    """Completion tokens drawn in training."""
    rollout_seconds: float = 0.0
    """Time spent drawing them."""
    budget_seconds: float = 0.0
    """Time of all steps by the clock of `training.max_seconds`."""
    step_seconds: list[float] = field(default_factory=list)
    """Duration of every step."""
    heldout: dict[str, Any] = field(default_factory=dict)
    """First evaluation of `base`, `handwritten`, `best_text` and `start`, and the best of
    `learned`: their metrics."""
    scores: dict[str, PlainScores] = field(default_factory=dict)
    """Of the same evaluations, what each completion got of what the best prompt is chosen by."""
    best_text: str | None = None
    """The best of `evaluation.texts`."""
    num_evaluations: int = 0
    """Held-out evaluations of learned prompts: what the best one was chosen from."""
    tested_steps: list[int] = field(default_factory=list)
    """Steps whose prompts have met the test queries."""
    num_rivals: int = 0
    """Held-out evaluations of other members of a population that it was chosen from as well."""
    succession: dict[str, Any] = field(default_factory=dict)
    """Tests of later prompts against the kept one, as `Succession` has them; empty where the
    highest mean is kept."""
    chosen: str = ""
    """How it was chosen among the members of a population, in words, where they had to be shown to
    be better."""
    signal: dict[str, Any] = field(default_factory=dict)
    """How often rewards could teach nothing; see `rlprompt.runs.signal`."""
    guards: dict[str, Any] = field(default_factory=dict)
    """What the guards have seen and the alarms they raised; see `GuardWatch`."""

    @property
    def kept_start(self) -> bool:
        """Whether the best prompt by held-out queries is the one that the run began with."""
        return self.best_reward is not None and self.best_step == 0


_PROGRESS = TypeAdapter(Progress)


def _progress(stored: dict[str, Any]) -> Progress:
    """The counters of a checkpoint.

    Raises:
        TypeError: they are not those of `Progress`, or not of their types.
    """
    try:
        # Earlier versions evaluated before they saved, and did not say so.
        known = {"evaluated_step": stored.get("step", 0), **stored}
        return _PROGRESS.validate_python(asdict(Progress(**known)))
    except ValidationError as error:
        first = error.errors()[0]
        raise TypeError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


class RunState:
    """Prompt, best prompt, counters of a run, and the state of what learns."""

    def __init__(self, learner: Learner) -> None:
        """The state of a run that has not begun."""
        self.learner = learner
        self.progress = Progress()
        self.best = learner.prompt_state()
        self._start = self.best

    def remember_best(
        self,
        reward: float,
        metrics: Mapping[str, Any],
        scores: PlainScores | None = None,
        *,
        is_better: bool | None = None,
    ) -> bool:
        """Keep the present prompt if it is better than the kept one; says whether it is.

        A reward of NaN (nothing could be scored) is never the best.

        Args:
            reward: what prompts are chosen by.
            metrics: what the evaluation found.
            scores: what each of its completions got.
            is_better: whether it was accepted against the kept one; None = its reward says it.
        """
        self.progress.num_evaluations += 1
        best = self.progress.best_reward
        if is_better is None:
            is_better = best is None or reward > best
        if math.isnan(reward) or not is_better:
            self.progress.stale_evaluations += 1
            return False
        self.progress.best_reward = reward
        self.progress.best_step = self.progress.step
        self.progress.stale_evaluations = 0
        self.progress.heldout["learned"] = dict(metrics)
        self.progress.scores["learned"] = scores or []
        self.best = self.learner.prompt_state()
        return True

    def best_prompt(self) -> Prompt:
        """A copy of the best prompt by held-out reward; without an evaluation, of the present."""
        if self.progress.best_reward is None:
            return self.learner.prompt.copy()
        return self.learner.restored_prompt(self.best)

    def start_prompt(self) -> Prompt:
        """A copy of the prompt that the run began with, as its recipe makes it."""
        return self.learner.restored_prompt(self._start)

    def checkpoint(self, identity: Mapping[str, str]) -> Checkpoint:
        """Everything as a checkpoint, which later changes of the run do not touch.

        Args:
            identity: what the run must find again to go on, such as the dataset's fingerprint.
        """
        random_tensors, random_state = global_random_state()
        learner = self.learner.state()
        tensors = {
            **{f"best/{k}": v.clone() for k, v in self.best.tensors.items()},
            **learner.tensors,
            **random_tensors,
        }
        state = {
            "progress": asdict(self.progress),
            "learner": dict(learner.plain),
            "best": dict(self.best.plain),
            "random": random_state,
            "identity": dict(identity),
        }
        return Checkpoint(self.progress.step, tensors, copy.deepcopy(state))

    def restore(self, checkpoint: Checkpoint, identity: Mapping[str, str]) -> None:
        """Take over a checkpoint made by `checkpoint`.

        Raises:
            InputError: its identity differs (other data, another base), or it holds another prompt.
        """
        stored = checkpoint.state.get("identity")
        for name, value in identity.items():
            if not isinstance(stored, Mapping) or stored.get(name) != value:
                raise InputError(
                    f"the {name} has changed since the checkpoint was written; restore it, or "
                    "start a new run in another output folder"
                )
        try:
            self._take_over(checkpoint)
        except ValueError as error:
            raise InputError(
                f"the checkpoint holds another prompt, algorithm or search ({error}); start a new "
                "run in another output folder"
            ) from error
        except (LookupError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
            raise InputError(
                f"the checkpoint is damaged ({describe_error(error)}); delete its folder to resume "
                "from the one before"
            ) from error

    def _take_over(self, checkpoint: Checkpoint) -> None:
        tensors, state = checkpoint.tensors, checkpoint.state
        progress = _progress(copy.deepcopy(state["progress"]))
        self.learner.restore(LearnerState(tensors, state["learner"]))
        best = {name: tensor.clone() for name, tensor in named_under(tensors, "best").items()}
        # Earlier versions kept nothing but tensors.
        self.best = LearnerState(best, state.get("best", {}))
        self.progress = progress
        restore_global_random_state(tensors, state["random"])
