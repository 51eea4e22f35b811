"""How near another prompt comes to the behaviour of the one that is inspected.

The measure is KL(inspected || other) per token, over the whole vocabulary, on completions that were
drawn under the inspected prompt: 0 for a prompt that does exactly what it does, whatever it looks
like.

Letters: Q queries, n completions per query, M completion tokens, d model width, P prefix positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlprompt.kernels.divergence import head_divergence
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.rollout.packing import pack
from rlprompt.types import Group, PrefixKV

Means = NDArray[np.float64]
"""[Q] a mean of each query."""
CONFIDENCE = 0.95
_RESAMPLES = 4000
TOKEN_BUDGET = 4096
"""Most packed tokens of one forward."""


@dataclass(frozen=True)
class Share:
    """How much of an effect something recovers, with an interval by query."""

    value: float
    """1 = all of it, 0 = none; below 0 it leads away."""
    low: float
    high: float


class Yardstick:
    """Completions of the inspected prompt, and what the base computes of them under it."""

    def __init__(self, policy: Policy, prompt: Prompt, groups: Sequence[Group]) -> None:
        """Run the base under the inspected prompt once.

        Args:
            policy: the policy over the base.
            prompt: the inspected prompt.
            groups: completions drawn under it.
        """
        self.policy = policy
        self.prompt = prompt
        self.groups = list(groups)
        self._counts = [sum(len(c.token_ids) for c in group.completions) for group in groups]
        self._micros = self._packed()
        with torch.no_grad():
            self._prefix = policy.prefix(prompt)
            self._states = [self._hidden(m, self._prefix, prompt) for m in self._micros]

    @property
    def num_tokens(self) -> int:
        """M, the tokens that are compared."""
        return sum(self._counts)

    def head(self, num_queries: int) -> Yardstick:
        """The same on the first queries only.

        Args:
            num_queries: number of queries to keep.
        """
        return Yardstick(self.policy, self.prompt, self.groups[:num_queries])

    @torch.no_grad()
    def kl(self, other: Prompt) -> Means:
        """[Q] KL(inspected || other) per token of each query's completions, in nats.

        Args:
            other: the other prompt.
        """
        return self._against(self.policy.prefix(other), other, None)

    @torch.no_grad()
    def kl_of_prefix(self, prefix: PrefixKV) -> Means:
        """[Q] as `kl`, under keys and values of which some positions were taken out.

        What follows keeps its positions, so that nothing changes but what can be attended to.

        Args:
            prefix: the inspected prompt's prefix with fewer positions.
        """
        return self._against(prefix, self.prompt, self._prefix.num_tokens)

    @property
    def prefix(self) -> PrefixKV:
        """Keys and values of the inspected prompt."""
        return self._prefix

    def pooled(self, by_query: Means) -> float:
        """The mean over all tokens of means by query."""
        weights = np.asarray(self._counts, dtype=np.float64)
        return float((by_query * weights).sum() / weights.sum())

    def _packed(self) -> list[list[int]]:
        """Micro-batches of whole groups."""
        queries = [len(self.policy.query_ids(g.query, self.prompt)) for g in self.groups]
        lengths = [[len(c.token_ids) for c in group.completions] for group in self.groups]
        packed = pack(queries, lengths, TOKEN_BUDGET, whole_groups=True)
        return [[g for g, _ in micro.rows] for micro in packed]

    def _hidden(
        self, chosen: Sequence[int], prefix: PrefixKV, prompt: Prompt, length: int | None = None
    ) -> Tensor:
        """[M, d] of the groups of a micro-batch; `length` = where the queries begin, if not P."""
        queries = [self.groups[g].query for g in chosen]
        completions = [self.groups[g].completions for g in chosen]
        if length is None:
            return self.policy.hidden_scored(queries, completions, prefix, prompt)
        tree = self.policy.tree(queries, completions, self._prefix, prompt)
        tree = replace(tree, prefix_length=prefix.num_tokens)
        return self.policy.hidden(tree, prefix).index_select(0, tree.predictors)

    def _against(self, prefix: PrefixKV, prompt: Prompt, length: int | None) -> Means:
        totals = np.zeros(len(self.groups))
        for chosen, own in zip(self._micros, self._states, strict=True):
            other = self._hidden(chosen, prefix, prompt, length)
            with self.policy.whole_ends():
                divergence = head_divergence(other, own, self.policy.forward.head, "forward_kl")
            parts = divergence.split([self._counts[g] for g in chosen])
            for g, part in zip(chosen, parts, strict=True):
                totals[g] = float(part.double().sum())
        return totals / np.asarray(self._counts, dtype=np.float64)


def share_of(part: Means, whole: Means, seed: int = 0) -> Share | None:
    """Mean of `part` over mean of `whole`, with a percentile interval over resampled queries.

    Args:
        part: [Q] what is recovered, by query.
        whole: [Q] what there is to recover.
        seed: seed of the resampling.

    Returns:
        None where it is not shown that there is anything: fewer than three queries with both, or a
        resampled whole that is not above 0 in more than one of forty.
    """
    known = np.isfinite(part) & np.isfinite(whole)
    part, whole = part[known], whole[known]
    if len(part) < 3:
        return None
    rows = np.random.default_rng(seed).integers(0, len(part), (_RESAMPLES, len(part)))
    wholes, parts = whole[rows].mean(axis=1), part[rows].mean(axis=1)
    if whole.mean() <= 0 or (wholes <= 0).mean() > (1.0 - CONFIDENCE) / 2:
        return None
    good = wholes > 0
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(parts[good] / wholes[good], [tail, 1.0 - tail])
    return Share(float(part.mean() / whole.mean()), float(low), float(high))
