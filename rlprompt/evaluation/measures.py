"""Numbers about a prompt that no reward gives: log-probabilities of completions.

Letters: Q queries, B completions, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rlprompt.kernels.divergence import head_divergence
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt
from rlprompt.rollout.packing import pack
from rlprompt.types import Group


@dataclass(frozen=True)
class TokenMeans:
    """A number per token, added up by query."""

    totals: Sequence[float]
    """Q sums over the tokens of a query's completions."""
    counts: Sequence[int]
    """Q numbers of those tokens."""

    @property
    def mean(self) -> float:
        """Mean over all tokens."""
        return sum(self.totals) / sum(self.counts)

    @property
    def by_query(self) -> list[float]:
        """Q means over the tokens of one query."""
        return [total / count for total, count in zip(self.totals, self.counts, strict=True)]


class Measure(Protocol):
    """A number about a prompt, or about what was drawn under it."""

    def __call__(self, prompt: Prompt, drawn: Sequence[Group]) -> TokenMeans:
        """The number, by query.

        Args:
            prompt: the prompt that is evaluated.
            drawn: held-out completions under it.
        """
        ...


class BaseLogprob:
    """Mean log-probability per token of the drawn completions under the base, in nats.

    It falls when a prompt buys reward with text that the model itself finds strange.
    """

    def __init__(self, policy: Policy, token_budget: int) -> None:
        """Score in micro-batches of at most `token_budget` packed tokens."""
        self._policy = policy
        self._budget = token_budget

    def __call__(self, prompt: Prompt, drawn: Sequence[Group]) -> TokenMeans:
        """See the class."""
        return logprobs_by_query(self._policy, NonePrompt(), drawn, self._budget)


class TargetLogprob:
    """Mean log-probability per token of given answers under the evaluated prompt, in nats."""

    def __init__(self, policy: Policy, targets: Sequence[Group], token_budget: int) -> None:
        """Keep the answers; at least one group."""
        self._policy = policy
        self._targets = targets
        self._budget = token_budget

    def __call__(self, prompt: Prompt, drawn: Sequence[Group]) -> TokenMeans:
        """See the class; what was drawn does not matter."""
        return logprobs_by_query(self._policy, prompt, self._targets, self._budget)


class TeacherKL:
    """Mean KL(teacher || prompt) per token over the whole vocabulary, in nats.

    Measured on completions that the teacher wrote for the held-out queries, drawn once, so that all
    prompts and steps meet the same tokens.
    """

    def __init__(
        self,
        policy: Policy,
        teacher: Prompt,
        write: Callable[[Prompt], Sequence[Group]],
        token_budget: int,
    ) -> None:
        """Keep the parts; nothing is drawn yet.

        Args:
            policy: policy over the base that both share.
            teacher: the teacher's prompt.
            write: function that draws completions of the held-out queries under a prompt.
            token_budget: most packed tokens per micro-batch.
        """
        self._policy = policy
        self._teacher = teacher
        self._write = write
        self._budget = token_budget
        self._written: Sequence[Group] | None = None

    def __call__(self, prompt: Prompt, drawn: Sequence[Group]) -> TokenMeans:
        """See the class; what was drawn under the prompt does not matter."""
        if self._written is None:
            self._written = self._write(self._teacher)
        return kl_by_query(self._policy, self._teacher, prompt, self._written, self._budget)


class BaseKL:
    """Mean KL(prompt || base) per token over the whole vocabulary, in nats, untempered.

    Measured on the completions that were drawn under the prompt. The base is without a system
    message, whatever the recipe's reference is, so that prompts of any recipe can be compared.
    """

    def __init__(self, policy: Policy, token_budget: int) -> None:
        """Score in micro-batches of at most `token_budget` packed tokens."""
        self._policy = policy
        self._budget = token_budget

    def __call__(self, prompt: Prompt, drawn: Sequence[Group]) -> TokenMeans:
        """See the class."""
        return kl_by_query(self._policy, prompt, NonePrompt(), drawn, self._budget)


@torch.no_grad()
def kl_by_query(
    policy: Policy, first: Prompt, second: Prompt, groups: Sequence[Group], token_budget: int
) -> TokenMeans:
    """KL(first || second) per token of given completions, over the whole vocabulary, in nats."""
    totals, counts = [0.0] * len(groups), [_num_tokens(group) for group in groups]
    first_prefix, second_prefix = policy.prefix(first), policy.prefix(second)
    for chosen in _whole_groups(policy, second, groups, token_budget):
        queries = [groups[g].query for g in chosen]
        completions = [groups[g].completions for g in chosen]
        of_first = policy.hidden_scored(queries, completions, first_prefix, first)
        of_second = policy.hidden_scored(queries, completions, second_prefix, second)
        with policy.whole_ends():
            divergence = head_divergence(of_second, of_first, policy.forward.head, "forward_kl")
        parts = divergence.split([counts[g] for g in chosen])
        for g, part in zip(chosen, parts, strict=True):
            totals[g] = float(part.sum())
    return TokenMeans(totals, counts)


def _num_tokens(group: Group) -> int:
    return sum(len(completion.token_ids) for completion in group.completions)


def _whole_groups(
    policy: Policy, prompt: Prompt, groups: Sequence[Group], token_budget: int
) -> list[list[int]]:
    """Micro-batches of whole groups, so that two prompts are scored on the same rows."""
    queries = [len(policy.query_ids(group.query, prompt)) for group in groups]
    lengths = [[len(c.token_ids) for c in group.completions] for group in groups]
    packed = pack(queries, lengths, token_budget, whole_groups=True)
    return [[g for g, _ in micro.rows] for micro in packed]


@torch.no_grad()
def logprobs_by_query(
    policy: Policy, prompt: Prompt, groups: Sequence[Group], token_budget: int
) -> TokenMeans:
    """Log-probability per completion token under a prompt, in nats, untempered."""
    prefix = policy.prefix(prompt)
    queries = [len(policy.query_ids(group.query, prompt)) for group in groups]
    lengths = [[len(c.token_ids) for c in group.completions] for group in groups]
    totals = [0.0] * len(groups)
    for micro in pack(queries, lengths, token_budget):
        tree = policy.tree(
            [groups[g].query for g, _ in micro.rows],
            [[groups[g].completions[i] for i in places] for g, places in micro.rows],
            prefix,
            prompt,
        )
        by_row = policy.logprobs(tree, prefix).logprobs.double().sum(dim=1).tolist()
        owners = [g for g, places in micro.rows for _ in places]
        for g, total in zip(owners, by_row, strict=True):
            totals[g] += total
    return TokenMeans(totals, [_num_tokens(group) for group in groups])
