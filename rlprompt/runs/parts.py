"""What a run is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlprompt.algorithms.base import Algorithm
from rlprompt.algorithms.constraints import Constraints
from rlprompt.algorithms.robust import QueryWeights
from rlprompt.data.base import QuerySplit
from rlprompt.distributed.ranks import Ranks
from rlprompt.evaluation.heldout import EvaluationSettings, HeldoutEvaluator
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.rewards.runner import RewardRunner
from rlprompt.rollout.sources import Source
from rlprompt.runs.guards import GuardWatch
from rlprompt.tracking.tracker import TrackerGroup
from rlprompt.training.settings import TrainingSettings


@dataclass(frozen=True)
class RunParts:
    """Everything a run is made of; `rlprompt.recipe.schema` builds it."""

    name: str
    """What the run is called in reports and artifacts."""
    policy: Policy
    """With the prompt that is trained."""
    algorithm: Algorithm
    """How the prompt learns."""
    source: Source
    """Where its batches come from."""
    reference: Prompt | None
    """Prompt of the reference policy; None when the algorithm needs none."""
    teacher: Prompt | None
    """Prompt of the teacher; None when the algorithm needs none."""
    constraints: Constraints | None
    """Multipliers of constraint rewards; None without any."""
    query_weights: QueryWeights | None
    """A robust objective; None when all queries count alike."""
    evaluator: HeldoutEvaluator
    """Scores prompts on held-out queries."""
    rewards: RewardRunner
    """What is rewarded."""
    data: QuerySplit
    """Training and held-out queries."""
    training: TrainingSettings
    """Steps, optimizer, checkpoints."""
    evaluation: EvaluationSettings
    """Held-out evaluation."""
    trackers: TrackerGroup
    """Where the run reports to."""
    seed: int
    """Of everything drawn at random."""
    recipe: Mapping[str, Any]
    """The resolved recipe as plain values."""
    ranks: Ranks = field(default_factory=Ranks)
    """Among whom the work is divided; alone by default."""
    guards: GuardWatch = field(default_factory=lambda: GuardWatch([]))
    """Watch the metrics for reward hacking."""
