"""Numbers about a prompt that no reward gives: log-probabilities of completions.

Letters: B completions, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from rlprompt.kernels.divergence import head_divergence
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt
from rlprompt.rollout.packing import pack
from rlprompt.types import Group


class Measure(Protocol):
    """A number about a prompt, or about what was drawn under it."""

    def __call__(self, prompt: Prompt, drawn: Sequence[Group]) -> float:
        """The number.

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

    def __call__(self, prompt: Prompt, drawn: Sequence[Group]) -> float:
        """See the class."""
        return mean_logprob(self._policy, NonePrompt(), drawn, self._budget)


class TargetLogprob:
    """Mean log-probability per token of given answers under the evaluated prompt, in nats."""

    def __init__(self, policy: Policy, targets: Sequence[Group], token_budget: int) -> None:
        """Keep the answers; at least one group."""
        self._policy = policy
        self._targets = targets
        self._budget = token_budget

    def __call__(self, prompt: Prompt, drawn: Sequence[Group]) -> float:
        """See the class; what was drawn does not matter."""
        return mean_logprob(self._policy, prompt, self._targets, self._budget)


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

    def __call__(self, prompt: Prompt, drawn: Sequence[Group]) -> float:
        """See the class; what was drawn under the prompt does not matter."""
        if self._written is None:
            self._written = self._write(self._teacher)
        return mean_kl(self._policy, self._teacher, prompt, self._written, self._budget)


class BaseKL:
    """Mean KL(prompt || base) per token over the whole vocabulary, in nats, untempered.

    Measured on the completions that were drawn under the prompt. The base is without a system
    message, whatever the recipe's reference is, so that prompts of any recipe can be compared.
    """

    def __init__(self, policy: Policy, token_budget: int) -> None:
        """Score in micro-batches of at most `token_budget` packed tokens."""
        self._policy = policy
        self._budget = token_budget

    def __call__(self, prompt: Prompt, drawn: Sequence[Group]) -> float:
        """See the class."""
        return mean_kl(self._policy, prompt, NonePrompt(), drawn, self._budget)


@torch.no_grad()
def mean_kl(
    policy: Policy, first: Prompt, second: Prompt, groups: Sequence[Group], token_budget: int
) -> float:
    """Mean KL(first || second) per token of given completions, over the whole vocabulary."""
    total, count = 0.0, 0
    first_prefix, second_prefix = policy.prefix(first), policy.prefix(second)
    for some in _whole_groups(policy, second, groups, token_budget):
        queries = [group.query for group in some]
        completions = [group.completions for group in some]
        of_first = policy.hidden_scored(queries, completions, first_prefix, first)
        of_second = policy.hidden_scored(queries, completions, second_prefix, second)
        with policy.whole_ends():
            divergence = head_divergence(of_second, of_first, policy.forward.head, "forward_kl")
        total += float(divergence.sum())
        count += divergence.numel()
    return total / count


def _whole_groups(
    policy: Policy, prompt: Prompt, groups: Sequence[Group], token_budget: int
) -> list[list[Group]]:
    """Micro-batches of whole groups, so that two prompts are scored on the same rows."""
    queries = [len(policy.query_ids(group.query, prompt)) for group in groups]
    lengths = [[len(c.token_ids) for c in group.completions] for group in groups]
    packed = pack(queries, lengths, token_budget, whole_groups=True)
    return [[groups[g] for g, _ in micro.rows] for micro in packed]


@torch.no_grad()
def mean_logprob(
    policy: Policy, prompt: Prompt, groups: Sequence[Group], token_budget: int
) -> float:
    """Mean log-probability per completion token under a prompt, in nats, untempered."""
    prefix = policy.prefix(prompt)
    queries = [len(policy.query_ids(group.query, prompt)) for group in groups]
    lengths = [[len(c.token_ids) for c in group.completions] for group in groups]
    total, count = 0.0, 0
    for micro in pack(queries, lengths, token_budget):
        tree = policy.tree(
            [groups[g].query for g, _ in micro.rows],
            [[groups[g].completions[i] for i in places] for g, places in micro.rows],
            prefix,
            prompt,
        )
        scores = policy.logprobs(tree, prefix)
        total += float(scores.logprobs.sum())
        count += int(scores.mask.sum())
    return total / count
