"""What a batch is learned for beside its rewards: constraints, and queries that count for more.

Both stand between the rewards and the algorithm, so they work with every algorithm: constraints
change the reward of a completion, robust objectives the weight of its query.

Letters: B completions, N queries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from rlprompt.algorithms.base import BatchView
from rlprompt.algorithms.constraints import Multipliers
from rlprompt.algorithms.robust import WorstGroup, cvar_weights
from rlprompt.errors import InputError
from rlprompt.settings import Settings
from rlprompt.types import Query


class ConstraintSettings(Settings):
    """How the multipliers of rewards with `role: constraint` are learned."""

    lr: float = Field(default=0.1, gt=0.0)
    """How far a multiplier moves per batch and unit of violation."""
    initial: float = Field(default=0.0, ge=0.0)
    """What the multipliers start from."""
    maximum: float | None = Field(default=None, gt=0.0)
    """What they never exceed; null = no bound."""
    rescale: bool = False
    """Divide the penalised reward by 1 + the sum of multipliers, so that its scale stays."""


class WorstGroupSettings(Settings):
    """Group DRO: learn for the worst group of queries (Sagawa et al., 2020, arXiv 1911.08731)."""

    type: Literal["worst_group"] = "worst_group"
    """Objective."""
    column: str
    """Column of the dataset that names a query's group."""
    step_size: float = Field(default=0.1, gt=0.0)
    """How fast the weights of groups follow their losses, per unit of loss."""


class CVaRSettings(Settings):
    """Learn for the worst share of the queries of each batch (Rockafellar and Uryasev, 2000)."""

    type: Literal["cvar"] = "cvar"
    """Objective."""
    share: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Share of the queries that counts."""


RobustSettings = Annotated[WorstGroupSettings | CVaRSettings, Field(discriminator="type")]


class Constraints:
    """Multipliers for the constraint rewards of a recipe."""

    def __init__(self, settings: ConstraintSettings, limits: Mapping[str, float]) -> None:
        """Start the multipliers.

        Args:
            settings: the rule by which they are learned.
            limits: by the name of the constraint, what its mean cost is held under
                (`RewardRunner.cost_limits`).
        """
        self._multipliers = Multipliers(
            limits,
            lr=settings.lr,
            initial=settings.initial,
            maximum=settings.maximum,
            rescale=settings.rescale,
        )

    def penalised(self, rewards: Tensor, costs: Mapping[str, Tensor]) -> Tensor:
        """Rewards [B] with the multipliers' penalties on costs [B]."""
        return self._multipliers.penalised(rewards, costs)

    def update(self, costs: Mapping[str, Tensor]) -> dict[str, float]:
        """Move the multipliers by the batch's violations; gives `constraint/*` metrics."""
        return self._multipliers.update(costs)

    def state_dict(self) -> dict[str, Tensor]:
        """The multipliers."""
        return self._multipliers.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over multipliers; ValueError when they are of other constraints."""
        self._multipliers.load_state_dict(state)


class QueryWeights:
    """What each query of a batch counts for under a robust objective.

    A query's loss is its mean reward, negated, or where an algorithm learns from given answers,
    their mean negative log-probability per token.
    """

    def __init__(
        self,
        settings: WorstGroupSettings | CVaRSettings,
        queries: Sequence[Query],
        *,
        uses_rewards: bool,
    ) -> None:
        """Look at the training queries.

        Raises:
            InputError: a query lacks the group's column, or all are in one group.
        """
        self._settings = settings
        self._uses_rewards = uses_rewards
        self._worst: WorstGroup | None = None
        if isinstance(settings, WorstGroupSettings):
            names = Counter(self._group(query) for query in queries)
            if len(names) < 2:
                raise InputError(
                    f"robust.column is '{settings.column}', which has one value in all training "
                    "queries; name a column that tells groups apart"
                )
            shares = {name: count / len(queries) for name, count in names.items()}
            self._worst = WorstGroup(shares, settings.step_size)

    @property
    def needs_logprobs(self) -> bool:
        """Whether `view.old_logprobs` must be there."""
        return not self._uses_rewards

    def row_weights(self, view: BatchView, queries: Sequence[Query]) -> Tensor:
        """float32 [B], what the rows of each query count for; moves a worst group's weights.

        Args:
            view: of the batch.
            queries: N, one per group of the view.
        """
        losses = self._losses(view)
        if self._worst is None:
            assert isinstance(self._settings, CVaRSettings)
            weights = cvar_weights(losses, self._settings.share)
        else:
            groups = [self._group(query) for query in queries]
            self._worst.update(losses, groups)
            weights = self._worst.weights(groups)
        return weights.float().repeat_interleave(view.group_size)

    def metrics(self) -> dict[str, float]:
        """`robust/weight/GROUP`, the weight of each group in the objective."""
        if self._worst is None:
            return {}
        return {f"robust/weight/{name}": v for name, v in self._worst.distribution.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of the groups."""
        return {} if self._worst is None else self._worst.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over weights; ValueError when they are of other groups."""
        if self._worst is not None:
            self._worst.load_state_dict(state)

    def _losses(self, view: BatchView) -> Tensor:
        """[N]; NaN where nothing is known of a query."""
        if self._uses_rewards:
            return -view.rewards.view(-1, view.group_size).nanmean(dim=1)
        assert view.old_logprobs is not None
        sums = view.old_logprobs.sum(1).view(-1, view.group_size).sum(1)
        return -sums / view.lengths.view(-1, view.group_size).sum(1)

    def _group(self, query: Query) -> str:
        assert isinstance(self._settings, WorstGroupSettings)
        column = self._settings.column
        if column not in query.columns:
            known = ", ".join(sorted(query.columns)) or "none"
            raise InputError(
                f"robust.column is '{column}', which row {query.index} of the dataset lacks "
                f"(columns: {known}); name one of them"
            )
        return str(query.columns[column])
