"""What completions that were drawn before say of a text prompt, by forwards of the base.

Nothing is drawn and nothing is scored by a reward here: completions are teacher-forced. A gradient
is that of training with the prompt's embeddings as what trains: micro-batches add up at the
prefix's keys and values, one backward over the prompt's tokens carries them to its embeddings
(`rlprompt.policy`). Texts that differ from a known one at place i share its keys and values before
i, and texts that part there share a forward. Completions of a query share the query, computed once
per text, since what stands after a prompt depends on it.

Letters: G queries, B completions, N texts, m slot tokens, h head tokens, V vocabulary, d model
width, P prefix tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.kernels.lm_head import head_logits
from rlprompt.model.forward.tree import TokenTree, TreeContext, build_tree
from rlprompt.policy import Policy, SharedPrefix, TokenScores
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.rollout.packing import pack
from rlprompt.search.substitution import one_hot_gradient
from rlprompt.types import Group, PrefixKV

_ANY_TEXT = TextPrompt("x")
"""What stands after a text in the slot is the same for every text."""
_SHORT = 64
"""Tokens of a text that are computed anew before each query, so that many texts share a forward."""
TOKEN_BUDGET = 1024
"""Most packed tokens of a micro-batch with a gradient, as of `training.token_budget`."""
FORWARD_BUDGET = 4096
"""Most packed tokens of a forward without one."""


@dataclass(frozen=True)
class Evidence:
    """Completions and what they count for."""

    groups: tuple[Group, ...]
    """G queries with their completions, B in all."""
    weights: Tensor
    """[B] float64, group by group: advantages, or 1 of given answers."""
    sampling_logprobs: Tensor
    """[B] float64 mean log-probability per token under the prompt that drew it; NaN = given."""

    def only(self, places: Sequence[int], weights: Tensor) -> Evidence:
        """Some of the completions, with weights [b] of their own.

        Args:
            places: b places among the B, in order.
            weights: [b] float64.
        """
        wanted, first, groups = set(places), 0, []
        for group in self.groups:
            numbered = enumerate(group.completions, start=first)
            kept = tuple(completion for number, completion in numbered if number in wanted)
            first += len(group.completions)
            if kept:
                groups.append(Group(group.query, kept))
        return Evidence(tuple(groups), weights, self.sampling_logprobs[list(places)])


class Gradient(NamedTuple):
    """The derivative of a weighted mean of log-probabilities at a text."""

    one_hot: Tensor
    """[m, V] by the row that chooses the token of each place."""
    logprobs: Tensor
    """[B] float64 mean log-probability per token of each completion under the text."""
    weights: Tensor
    """[B] float64, what each of them counted for."""


class Forwards:
    """Teacher-forced forwards under text prompts, and how many there were."""

    def __init__(self, policy: Policy, temperature: float) -> None:
        """Run on a policy's base.

        Args:
            policy: the policy; its own prompt plays no part.
            temperature: sampling temperature that log-probabilities are tempered by, above 0.
        """
        self._policy = policy
        self._temperature = temperature
        self._embeddings: Tensor | None = None
        self.forwards = 0
        """Sequences read so far: completions under a text, and texts for their own probability."""
        self.backwards = 0
        """Completions differentiated so far."""

    @property
    def embeddings(self) -> Tensor:
        """[V, d] embedding of each named token."""
        if self._embeddings is None:
            self._embeddings = self._policy.embed(range(self._policy.vocab_size))
        return self._embeddings

    @torch.enable_grad()
    def gradient(
        self,
        token_ids: Sequence[int],
        evidence: Evidence,
        weigh: Callable[[Tensor, Tensor], Tensor],
    ) -> Gradient:
        """The derivative of mean_i w_i l_i by the tokens of a text; see `search.substitution`.

        Args:
            token_ids: the m slot tokens of the text, at least one.
            evidence: the B completions.
            weigh: the weights w [b] of some completions, of their places int64 [b] among the B
                and their log-probabilities [b]; nothing is differentiated through it.
        """
        policy = self._policy
        soft = SoftPrompt(policy.embed(token_ids))
        shared = SharedPrefix(policy.prefix(soft))
        logprobs = torch.zeros(len(evidence.weights), dtype=torch.float64)
        weights = torch.zeros_like(logprobs)
        for chosen, tree in self._micro_batches(evidence, shared.leaves):
            means = _token_means(policy.logprobs(tree, shared.leaves, self._temperature))
            logprobs[chosen] = means.detach().double().cpu()
            weights[chosen] = weigh(chosen, logprobs[chosen])
            (weights[chosen].to(means) * means).sum().div(len(weights)).backward()
        shared.backward()
        self.forwards += len(weights)
        self.backwards += len(weights)
        found = soft.embeddings.grad
        assert found is not None
        return Gradient(one_hot_gradient(found, self.embeddings), logprobs, weights)

    @torch.no_grad()
    def logprobs(
        self, texts: Sequence[Sequence[int]], evidence: Evidence, like: Sequence[int]
    ) -> Tensor:
        """Mean log-probability per token of completions under several texts.

        Args:
            texts: N rows of slot tokens.
            evidence: the B completions.
            like: slot tokens of a text that most of them begin like.

        Returns:
            [N, B] float64.
        """
        out = torch.zeros(len(texts), len(evidence.weights), dtype=torch.float64)
        asked = [self._policy.query_ids(group.query, _ANY_TEXT) for group in evidence.groups]
        self._require_room(max(len(text) for text in texts), asked, evidence)
        for shared in self._shared(texts, like):
            for part in _parts(shared, asked, evidence):
                tree = build_tree(
                    part.queries, part.completions, shared.prefix.num_tokens, self._policy.device
                )
                scores = self._policy.logprobs(tree, shared.prefix, self._temperature)
                out[part.texts, part.places] = _token_means(scores).double().cpu()
        self.forwards += out.numel()
        return out

    def _require_room(
        self, tokens: int, asked: Sequence[Sequence[int]], evidence: Evidence
    ) -> None:
        """Refuse a text with which a query and its completion are longer than the base takes."""
        most = self._policy.forward.max_positions
        longest = max(
            len(ids) + max(len(c.token_ids) for c in group.completions)
            for ids, group in zip(asked, evidence.groups, strict=True)
        )
        needed = len(self._policy.head_ids) + tokens + longest
        if needed > most:
            raise InputError(
                f"a text of {tokens} tokens with a query and its completion needs {needed} "
                f"positions, {self._policy.base.id} has {most}; lower search.grow or "
                "sampling.max_tokens"
            )

    @torch.no_grad()
    def fluency(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Mean log-probability per token of texts under the base, as the system text.

        Without a head there is nothing before the first token, which then does not count.

        Args:
            texts: N rows of slot tokens, at least one token each.

        Returns:
            [N] float64, in nats at temperature 1.
        """
        head = list(self._policy.head_ids)
        if not head:
            return self._fluency_without_head(texts)
        prefix = self._policy.head_prefix().cut(len(head) - 1)
        tree = build_tree([head[-1:]], [texts], len(head) - 1, self._policy.device)
        self.forwards += len(texts)
        return _token_means(self._policy.logprobs(tree, prefix)).double().cpu()

    def _fluency_without_head(self, texts: Sequence[Sequence[int]]) -> Tensor:
        prefix = self._policy.head_prefix()
        out = torch.zeros(len(texts), dtype=torch.float64)
        for row, ids in enumerate(texts):
            if len(ids) > 1:
                tree = build_tree([ids[:1]], [[ids[1:]]], 0, self._policy.device)
                out[row] = _token_means(self._policy.logprobs(tree, prefix)).double().cpu()
        self.forwards += len(texts)
        return out

    @torch.no_grad()
    def next_logprobs(self, token_ids: Sequence[int]) -> Tensor:
        """What the base would write at each place of a text, after the tokens before it.

        Args:
            token_ids: the m slot tokens.

        Returns:
            [m, V] log-probabilities of named tokens at temperature 1; zeros in the first row where
            no token stands before the slot.
        """
        policy = self._policy
        head = list(policy.head_ids)
        tokens = [*head, *token_ids][:-1]
        out = torch.zeros(len(token_ids), policy.vocab_size)
        if tokens:
            tree = build_tree([tokens], [[]], 0, policy.device)
            states = policy.hidden(tree, policy.head_prefix().cut(0))
            states = states[max(0, len(head) - 1) :]
            logits = head_logits(states, policy.forward.head)
            wanted = logits.log_softmax(dim=-1)[:, : policy.vocab_size].cpu()
            out[len(out) - len(wanted) :] = wanted
        self.forwards += 1
        return out

    def _micro_batches(self, evidence: Evidence, prefix: PrefixKV) -> Iterator[_MicroBatch]:
        """The completions behind a prompt, in packed parts."""
        policy, groups = self._policy, evidence.groups
        asked = [len(policy.query_ids(group.query, _ANY_TEXT)) for group in groups]
        lengths = [[len(c.token_ids) for c in group.completions] for group in groups]
        firsts = [sum(len(own) for own in lengths[:g]) for g in range(len(lengths))]
        for part in pack(asked, lengths, TOKEN_BUDGET):
            queries = [groups[g].query for g, _ in part.rows]
            rows = [[groups[g].completions[i] for i in places] for g, places in part.rows]
            chosen = [firsts[g] + place for g, places in part.rows for place in places]
            tree = policy.tree(queries, rows, prefix, _ANY_TEXT)
            yield _MicroBatch(torch.tensor(chosen), tree)

    def _shared(self, texts: Sequence[Sequence[int]], like: Sequence[int]) -> Iterator[_Shared]:
        """Texts with what they have in common computed."""
        policy = self._policy
        known = policy.prefill(policy.embed([*policy.head_ids, *like]))
        head = len(policy.head_ids)
        parting = [shared_start(text, like) for text in texts]
        near = [row for row, text in enumerate(texts) if len(text) - parting[row] <= _SHORT]
        if near:
            place = min(parting[row] for row in near)
            yield _Shared(known.cut(head + place), {row: texts[row][place:] for row in near})
        others = [row for row in range(len(texts)) if row not in near]
        for place in sorted({parting[row] for row in others}):
            rest = {row: texts[row][place:] for row in others if parting[row] == place}
            for row, prefix in self._continued(known.cut(head + place), rest).items():
                yield _Shared(prefix, {row: []})

    def _continued(
        self, before: PrefixKV, rest: Mapping[int, Sequence[int]]
    ) -> dict[int, PrefixKV]:
        """`before` and each row's further tokens, in one forward."""
        made = {row: before for row, tokens in rest.items() if not tokens}
        rows = [row for row, tokens in rest.items() if tokens]
        if not rows:
            return made
        policy = self._policy
        tree = build_tree(
            [rest[row] for row in rows], [[] for _ in rows], before.num_tokens, policy.device
        )
        context = TreeContext(tree, before, keep_queries=True)
        policy.forward.hidden(policy.embed_ids(tree.token_ids), tree.positions, context)
        for place, row in enumerate(rows):
            length = len(rest[row])
            keys = [own[place, :, :length] for own in context.query_keys]
            values = [own[place, :, :length] for own in context.query_values]
            made[row] = PrefixKV(_after(before.keys, keys), _after(before.values, values))
        return made


class _Shared(NamedTuple):
    """Texts that share a prefix."""

    prefix: PrefixKV
    rest: Mapping[int, Sequence[int]]
    """By the number of each text, its tokens behind the prefix."""


class _Part(NamedTuple):
    """Completions under some texts that share a prefix, as one forward takes them."""

    queries: list[list[int]]
    """The rest of a text and a query, of each group."""
    completions: list[list[Sequence[int]]]
    texts: Tensor
    """int64 [b] text of each completion."""
    places: Tensor
    """int64 [b] its place among the B."""


def _parts(shared: _Shared, asked: Sequence[Sequence[int]], evidence: Evidence) -> Iterator[_Part]:
    """Every completion under every text, in packed parts."""
    rows = [[c.token_ids for c in group.completions] for group in evidence.groups]
    firsts = [sum(len(own) for own in rows[:g]) for g in range(len(rows))]
    pairs = [(text, g) for text in shared.rest for g in range(len(rows))]
    before = [[*shared.rest[text], *asked[g]] for text, g in pairs]
    lengths = [[len(row) for row in rows[g]] for _, g in pairs]
    for part in pack([len(ids) for ids in before], lengths, FORWARD_BUDGET):
        chosen = [(*pairs[pair], place) for pair, places in part.rows for place in places]
        yield _Part(
            [before[pair] for pair, _ in part.rows],
            [[rows[pairs[pair][1]][place] for place in places] for pair, places in part.rows],
            torch.tensor([text for text, _, _ in chosen]),
            torch.tensor([firsts[g] + place for _, g, place in chosen]),
        )


class _MicroBatch(NamedTuple):
    """Some completions of the evidence."""

    chosen: Tensor
    """int64 [b] their places among the B."""
    tree: TokenTree
    """The same completions in the same order."""


def _after(before: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
    """[H_kv, P, D] before [H_kv, n, D], layer by layer."""
    return [torch.cat([a, b.to(a.dtype)], dim=1) for a, b in zip(before, own, strict=True)]


def _token_means(scores: TokenScores) -> Tensor:
    """[B] means over the tokens of each completion."""
    return scores.logprobs.sum(dim=1) / scores.mask.sum(dim=1)


def shared_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
