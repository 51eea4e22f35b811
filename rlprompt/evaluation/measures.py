"""Numbers about a prompt that no reward gives: log-probabilities under the base or the prompt.

Ranks divide the queries: each scores its own, and all get every number.

Letters: Q queries, B completions, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch

from rlprompt.distributed.ranks import Ranks
from rlprompt.kernels.divergence import head_divergence
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt
from rlprompt.rollout.packing import MicroBatch, pack
from rlprompt.types import Completion, Group, Query

T = TypeVar("T")


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

    def __init__(self, policy: Policy, token_budget: int, ranks: Ranks | None = None) -> None:
        """Score in micro-batches of at most `token_budget` packed tokens, divided among ranks."""
        self._policy = policy
        self._budget = token_budget
        self._ranks = ranks or Ranks()

    def __call__(self, prompt: Prompt, drawn: Sequence[Group]) -> TokenMeans:
        """See the class."""
        return logprobs_by_query(self._policy, NonePrompt(), drawn, self._budget, self._ranks)


class QueryInformation:
    """How much an answer tells about its query: log p(query | answer) - log p(query), in nats.

    Per token of the query, under the base without a system message, which is asked for the question
    behind the answer, and behind no answer. It is the pointwise mutual information of the two, used
    to rank answers by Li et al. (2016, arXiv 1510.03055, section 4.2). No reward of ours looks at
    it, so it can tell whether answers that a reward likes still are about what was asked. It cannot
    tell whether they are true.
    """

    def __init__(self, policy: Policy, token_budget: int, ranks: Ranks | None = None) -> None:
        """Score in micro-batches of at most `token_budget` packed tokens, divided among ranks."""
        self._policy = policy
        self._budget = token_budget
        self._ranks = ranks or Ranks()

    def __call__(self, prompt: Prompt, drawn: Sequence[Group]) -> TokenMeans:
        """See the class; what the prompt is does not matter.

        Raises:
            InputError: see `ChatSlot.completion_ids`, or answer and query are too long for the
                base together.
        """
        asked = [
            Group(_behind(completion.text), (self._given(group.query.text),))
            for group in drawn
            for completion in group.completions
        ]
        alone = [Group(_behind(""), (self._given(group.query.text),)) for group in drawn]
        known = logprobs_by_query(self._policy, NonePrompt(), asked, self._budget, self._ranks)
        before = logprobs_by_query(self._policy, NonePrompt(), alone, self._budget, self._ranks)
        totals, counts, place = [], [], 0
        for g, group in enumerate(drawn):
            copies = len(group.completions)
            told = sum(known.totals[place : place + copies])
            totals.append(told - copies * before.totals[g])
            counts.append(copies * before.counts[g])
            place += copies
        return TokenMeans(totals, counts)

    def _given(self, text: str) -> Completion:
        return Completion(tuple(self._policy.slot.completion_ids(text)), (), text, True)


def _behind(answer: str) -> Query:
    """What is asked about an answer, or about none."""
    text = f"Here is an answer.\n\n{answer}\n\nWhat was the question?"
    return Query(({"role": "user", "content": text},))


class TargetLogprob:
    """Mean log-probability per token of given answers under the evaluated prompt, in nats."""

    def __init__(
        self,
        policy: Policy,
        targets: Sequence[Group],
        token_budget: int,
        ranks: Ranks | None = None,
    ) -> None:
        """Keep the answers; at least one group."""
        self._policy = policy
        self._targets = targets
        self._budget = token_budget
        self._ranks = ranks or Ranks()

    def __call__(self, prompt: Prompt, drawn: Sequence[Group]) -> TokenMeans:
        """See the class; what was drawn does not matter."""
        return logprobs_by_query(self._policy, prompt, self._targets, self._budget, self._ranks)


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
        ranks: Ranks | None = None,
    ) -> None:
        """Keep the parts; nothing is drawn yet.

        Args:
            policy: policy over the base that both share.
            teacher: the teacher's prompt.
            write: function that draws completions of the held-out queries under a prompt.
            token_budget: most packed tokens per micro-batch.
            ranks: ranks that divide the scoring; None when this process is alone.
        """
        self._policy = policy
        self._ranks = ranks or Ranks()
        self._teacher = teacher
        self._write = write
        self._budget = token_budget
        self._written: Sequence[Group] | None = None

    def __call__(self, prompt: Prompt, drawn: Sequence[Group]) -> TokenMeans:
        """See the class; what was drawn under the prompt does not matter."""
        if self._written is None:
            self._written = self._write(self._teacher)
        return kl_by_query(
            self._policy, self._teacher, prompt, self._written, self._budget, self._ranks
        )


class BaseKL:
    """Mean KL(prompt || base) per token over the whole vocabulary, in nats, untempered.

    Measured on the completions that were drawn under the prompt. The base is without a system
    message, whatever the recipe's reference is, so that prompts of any recipe can be compared.
    """

    def __init__(self, policy: Policy, token_budget: int, ranks: Ranks | None = None) -> None:
        """Score in micro-batches of at most `token_budget` packed tokens, divided among ranks."""
        self._policy = policy
        self._budget = token_budget
        self._ranks = ranks or Ranks()

    def __call__(self, prompt: Prompt, drawn: Sequence[Group]) -> TokenMeans:
        """See the class."""
        return kl_by_query(self._policy, prompt, NonePrompt(), drawn, self._budget, self._ranks)


@torch.no_grad()
def kl_by_query(
    policy: Policy,
    first: Prompt,
    second: Prompt,
    groups: Sequence[Group],
    token_budget: int,
    ranks: Ranks | None = None,
) -> TokenMeans:
    """KL(first || second) per token of given completions, over the whole vocabulary, in nats.

    Args:
        policy: policy over the base of both.
        first: the prompt whose distribution the mean is over.
        second: the other one.
        groups: completions of Q queries.
        token_budget: most packed tokens per micro-batch.
        ranks: ranks that divide the queries, all of which call this; None when this process is
            alone.

    Raises:
        InputError: something is too long for the base, on any rank.
    """
    ranks, counts = ranks or Ranks(), [_num_tokens(group) for group in groups]
    first_prefix, second_prefix = policy.prefix(first), policy.prefix(second)

    def cut(own: Sequence[int]) -> list[list[int]]:
        packed = _packed(policy, second, groups, own, token_budget, whole_groups=True)
        return [[g for g, _ in micro.rows] for micro in packed]

    turns = _turns(policy, ranks, len(groups), cut)

    def score() -> list[float]:
        totals = [0.0] * len(groups)
        for chosen, is_own in turns:
            queries = [groups[g].query for g in chosen]
            completions = [groups[g].completions for g in chosen]
            of_first = policy.hidden_scored(queries, completions, first_prefix, first)
            of_second = policy.hidden_scored(queries, completions, second_prefix, second)
            with policy.whole_ends():
                divergence = head_divergence(of_second, of_first, policy.forward.head, "forward_kl")
            parts = divergence.split([counts[g] for g in chosen])
            for g, part in zip(chosen, parts, strict=True):
                totals[g] += float(part.sum()) if is_own else 0.0
        return totals[ranks.share(len(groups))]

    return TokenMeans(_gathered(ranks, score), counts)


def _turns(
    policy: Policy, ranks: Ranks, count: int, cut: Callable[[Sequence[int]], list[T]]
) -> list[tuple[T, bool]]:
    """Micro-batches of this rank's queries; ranks that share weights all take the same number.

    A turn without work of its own, marked False, runs some micro-batch for the others' sake.

    Args:
        policy: policy, which knows whether ranks share weights.
        ranks: ranks that divide the queries.
        count: number of the queries.
        cut: function that makes micro-batches of the queries with these numbers.
    """
    turns = [(micro, True) for micro in cut(range(count)[ranks.share(count)])]
    if policy.base.shards is None or not count:
        return turns
    spare = cut(range(1))[0]
    return turns + [(spare, False)] * (ranks.largest(len(turns)) - len(turns))


def _gathered(ranks: Ranks, score: Callable[[], list[float]]) -> list[float]:
    """The numbers of all queries, from those of each rank's own."""
    return [each for part in ranks.each(score, "the evaluation") for each in part]


def _num_tokens(group: Group) -> int:
    return sum(len(completion.token_ids) for completion in group.completions)


def _packed(
    policy: Policy,
    prompt: Prompt,
    groups: Sequence[Group],
    own: Sequence[int],
    token_budget: int,
    whole_groups: bool = False,
) -> list[MicroBatch]:
    """Micro-batches of the groups with these numbers.

    Whole groups let two prompts be scored on the same rows.
    """
    queries = [len(policy.query_ids(groups[g].query, prompt)) for g in own]
    lengths = [[len(c.token_ids) for c in groups[g].completions] for g in own]
    return [
        replace(micro, rows=tuple((own[place], rows) for place, rows in micro.rows))
        for micro in pack(queries, lengths, token_budget, whole_groups)
    ]


@torch.no_grad()
def logprobs_by_query(
    policy: Policy,
    prompt: Prompt,
    groups: Sequence[Group],
    token_budget: int,
    ranks: Ranks | None = None,
) -> TokenMeans:
    """Log-probability per completion token under a prompt, in nats, untempered.

    Args:
        policy: policy over the base.
        prompt: the prompt to score under.
        groups: completions of Q queries.
        token_budget: most packed tokens per micro-batch.
        ranks: ranks, see `kl_by_query`.

    Raises:
        InputError: something is too long for the base, on any rank.
    """
    ranks, prefix = ranks or Ranks(), policy.prefix(prompt)

    def cut(own: Sequence[int]) -> list[MicroBatch]:
        return _packed(policy, prompt, groups, own, token_budget)

    turns = _turns(policy, ranks, len(groups), cut)

    def score() -> list[float]:
        totals = [0.0] * len(groups)
        for micro, is_own in turns:
            tree = policy.tree(
                [groups[g].query for g, _ in micro.rows],
                [[groups[g].completions[i] for i in places] for g, places in micro.rows],
                prefix,
                prompt,
            )
            by_row = policy.logprobs(tree, prefix).logprobs.double().sum(dim=1).tolist()
            owners = [g for g, places in micro.rows for _ in places]
            for g, total in zip(owners, by_row, strict=True):
                totals[g] += total if is_own else 0.0
        return totals[ranks.share(len(groups))]

    return TokenMeans(_gathered(ranks, score), [_num_tokens(group) for group in groups])
