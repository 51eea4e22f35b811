"""Robust objectives: what a query counts for, from how badly the policy does on it.

Both weigh the queries of a batch and leave the rest of an algorithm alone, so they work with every
algorithm. The weights have mean 1 (group DRO: expectation 1), so learning rates keep their meaning.

Letters: B completions, N queries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlprompt.algorithms.base import BatchView
from rlprompt.errors import InputError
from rlprompt.settings import Settings
from rlprompt.types import Query


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


def cvar_weights(losses: Tensor, share: float) -> Tensor:
    """Weights [N] whose weighted mean loss is the mean over the worst `share` of the queries.

    The maximiser of mean(w * loss) over 0 <= w <= 1 / share with mean(w) = 1, the dual form of the
    conditional value at risk (Rockafellar and Uryasev, 2000). The last query counts in part when
    share * N is not whole. With share = 1 all weights are 1.

    Args:
        losses: [N]; NaN = unknown, which gets weight 0 and is not counted in N.
        share: the share of the queries that are the worst, in (0, 1].
    """
    known = ~losses.isnan()
    count = int(known.sum())
    weights = torch.zeros_like(losses)
    if count == 0:
        return weights
    order = losses.masked_fill(~known, -math.inf).argsort(descending=True, stable=True)[:count]
    taken = torch.arange(count, device=losses.device, dtype=losses.dtype)
    weights[order] = (share * count - taken).clamp(0.0, 1.0) / share
    return weights


class WorstGroup:
    """Group DRO: a distribution over groups of queries that moves towards those with a high loss.

    Online exponentiated gradient (Sagawa et al., 2020, arXiv 1911.08731, algorithm 1), for queries
    that are drawn from the whole dataset: both the group losses and the weighted objective are
    estimated without bias by dividing by the group's share of the data. Losses are taken relative
    to the mean of the batch, which changes no expectation of the distribution and much of its
    noise.
    """

    def __init__(self, shares: Mapping[str, float], step_size: float) -> None:
        """Start from the groups' shares of the data, with which every query has weight 1.

        Args:
            shares: the share of queries in each group; sums to 1.
            step_size: the step size of the exponentiated gradient, per unit of loss.
        """
        self._names = sorted(shares)
        self._shares = torch.tensor([shares[name] for name in self._names], dtype=torch.float64)
        self._step_size = step_size
        self._log_weights = self._shares.log()

    @property
    def distribution(self) -> dict[str, float]:
        """The weight of each group in the objective; sums to 1."""
        return dict(zip(self._names, self._log_weights.softmax(0).tolist(), strict=True))

    def update(self, losses: Tensor, groups: Sequence[str]) -> None:
        """Move towards groups with a high loss.

        Args:
            losses: [N]; NaN = unknown.
            groups: the group of each query.

        Raises:
            KeyError: a group was not named at the start.
        """
        members = self._members(groups)
        known = ~losses.isnan()
        if not bool(known.any()):
            return
        centred = (losses.double().cpu() - losses.double().nanmean().cpu()).nan_to_num(nan=0.0)
        estimate = (members * centred).sum(dim=1) / (float(known.sum()) * self._shares)
        self._log_weights = (self._log_weights + self._step_size * estimate).log_softmax(0)

    def weights(self, groups: Sequence[str]) -> Tensor:
        """What each query counts for, float32 [N]: its group's weight over its group's share.

        Raises:
            KeyError: a group was not named at the start.
        """
        ratio = self._log_weights.softmax(0) / self._shares
        return (ratio @ self._members(groups)).float()

    def state_dict(self) -> dict[str, Tensor]:
        """What resuming needs."""
        return {"log_weights": self._log_weights.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: it is of another number of groups.
        """
        saved = state["log_weights"]
        if saved.shape != self._log_weights.shape:
            raise ValueError(f"saved for {saved.numel()} groups, there are {len(self._names)}")
        self._log_weights = saved.detach().cpu().double().clone()

    def _members(self, groups: Sequence[str]) -> Tensor:
        """float64 [K, N]: 1 where the query is in the group."""
        place = {name: index for index, name in enumerate(self._names)}
        index = torch.tensor([place[name] for name in groups], dtype=torch.int64)
        return torch.nn.functional.one_hot(index, len(self._names)).double().t()


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
            view: what is known of the batch.
            queries: the N queries of the batch, one per group of the view.
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
