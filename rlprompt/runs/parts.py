"""What a run is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlprompt.data.base import QuerySplit
from rlprompt.distributed.ranks import Ranks
from rlprompt.endpoints.ledger import Ledger
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.evaluation.heldout import EvaluationSettings, HeldoutEvaluator
from rlprompt.policy import Policy, require_policy
from rlprompt.prompts.target import Target
from rlprompt.runs.guards import GuardWatch
from rlprompt.runs.learner import Learner
from rlprompt.runs.settings import RunSettings
from rlprompt.tracking.tracker import TrackerGroup


@dataclass(frozen=True)
class RunParts:
    """Everything that the life of a run needs; `rlprompt.recipe.build` makes it."""

    name: str
    """What the run is called in reports and artifacts."""
    target: Target
    """What the prompt is learned for: a policy over a base that is here, or a model elsewhere."""
    learner: Learner
    """What makes the prompt better."""
    evaluator: HeldoutEvaluator
    """Scores prompts on the validation queries, which choose the best one."""
    data: QuerySplit
    """Training and held-out queries."""
    settings: RunSettings
    """Steps, time limit, checkpoints."""
    evaluation: EvaluationSettings
    """Held-out evaluation."""
    sampling: SamplingSettings
    """How answers are drawn under the prompt when the run has ended."""
    trackers: TrackerGroup
    """Where the run reports to."""
    seed: int
    """Of everything drawn at random."""
    recipe: Mapping[str, Any]
    """The resolved recipe as plain values."""
    write_report: Callable[[Path], object]
    """Draws the report of a run folder."""
    ranks: Ranks = field(default_factory=Ranks)
    """Among whom the work is divided; alone by default."""
    test: HeldoutEvaluator | None = None
    """Scores the chosen prompt on queries that chose nothing, once; None = there are none."""
    guards: GuardWatch = field(default_factory=lambda: GuardWatch([]))
    """Watch the metrics for reward hacking."""
    ledger: Ledger | None = None
    """What is asked of models behind endpoints, and what may be spent; None = nothing is."""

    @property
    def policy(self) -> Policy:
        """The frozen base under the learner's prompt.

        Raises:
            InputError: the prompt is learned for a model that is elsewhere.
        """
        return require_policy(self.target)
