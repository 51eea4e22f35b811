"""Objectives for shift: what a query counts for, from how badly the policy does on it.

Both weigh the queries of a batch and leave the rest of an algorithm alone. The weights have mean 1
(group DRO: expectation 1), so learning rates keep their meaning.

Letters: N queries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def cvar_weights(losses: Tensor, share: float) -> Tensor:
    """Weights [N] whose weighted mean loss is the mean over the worst `share` of the queries.

    The maximiser of mean(w * loss) over 0 <= w <= 1 / share with mean(w) = 1, the dual form of the
    conditional value at risk (Rockafellar and Uryasev, 2000). The last query counts in part when
    share * N is not whole. With share = 1 all weights are 1.

    Args:
        losses: [N]; NaN = unknown, which gets weight 0 and is not counted in N.
        share: in (0, 1].
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
            step_size: of the exponentiated gradient, per unit of loss.
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
