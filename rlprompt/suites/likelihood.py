"""Log-probability of given answers, whole or from a point on, as evaluation harnesses ask for it.

Letters: M scored tokens, d model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.kernels.lm_head import head_logits
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.rollout.packing import pack
from rlprompt.types import Completion, Message, PrefixKV, Query

_LOGIT_ROWS = 64
"""Rows of logits that are there at once."""


class Likelihood(NamedTuple):
    """How likely a text is."""

    logprob: float
    """Sum over its tokens, nats."""
    is_greedy: bool
    """Whether every token is the most likely one at its place."""


@dataclass(frozen=True)
class GivenAnswer:
    """An answer, and the point from which on it is scored."""

    turns: tuple[Message, ...]
    """Turns of user and assistant before it, the user's last."""
    text: str
    """What is scored. White space at the start of an answer and at its end is dropped."""
    begun: str = ""
    """What stands before `text` in the same answer and is not scored."""


@dataclass(frozen=True)
class _Piece:
    """Tokens of one answer that one forward reads."""

    answer: int
    query: Query
    ids: tuple[int, ...]
    first: int
    """The first of them that is scored."""


@torch.no_grad()
def likelihoods(
    policy: Policy, prompt: Prompt, answers: Sequence[GivenAnswer], token_budget: int
) -> list[Likelihood]:
    """Log-probabilities of given answers under a prompt, untempered, without the token that ends.

    Args:
        policy: policy over the base.
        prompt: prompt in the system turn.
        answers: answers, in any order; those behind equal turns are best given together.
        token_budget: most packed tokens of a forward.

    Returns:
        One per answer, in order; an answer without a token has log-probability 0.

    Raises:
        InputError: an answer cannot be encoded, or is longer than the base's positions.
    """
    pieces = []
    for place, each in enumerate(answers):
        begun = _ids(policy, each.begun)
        ids = _ids(policy, each.begun + each.text)
        if len(ids) > (first := _common(begun, ids)):
            pieces.append(_Piece(place, _query(each.turns, place), ids, first))
    return _added(policy, prompt, pieces, len(answers), token_budget)


@torch.no_grad()
def rolling_likelihoods(
    policy: Policy, prompt: Prompt, texts: Sequence[str], token_budget: int
) -> list[float]:
    """Log-probabilities of whole texts, as the answers to a user who said nothing.

    A text that is longer than the base's positions is cut into windows, in which each token is
    scored once. Every window but the first begins with the token before it, and the last one with
    as many as there is room for.

    Args:
        policy: policy over the base.
        prompt: prompt in the system turn.
        texts: texts; white space at their ends is dropped.
        token_budget: most packed tokens of a forward.

    Returns:
        Sums in nats, in order.

    Raises:
        InputError: a text cannot be encoded, or prompt and template leave no room.
    """
    query = _query(({"role": "user", "content": ""},), 0)
    used = policy.prefix_length(prompt) + len(policy.query_ids(query, prompt))
    room = policy.forward.max_positions - used
    if room < 2:
        raise InputError(
            f"prompt and template take {used} of the {policy.forward.max_positions} positions of "
            f"{policy.base.id}, which leaves no room for a text; take a shorter prompt"
        )
    pieces = [
        _Piece(place, query, ids, first)
        for place, text in enumerate(texts)
        for ids, first in windows(_ids(policy, text), room)
    ]
    found = _added(policy, prompt, pieces, len(texts), token_budget)
    return [each.logprob for each in found]


def windows(ids: Sequence[int], room: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """A text's tokens in windows; see `rolling_likelihoods`.

    Args:
        ids: tokens, which may be none.
        room: tokens of the longest window, at least 2.

    Returns:
        Tokens of each window, and the first of them that is scored.
    """
    done = 0
    while done < len(ids):
        end = min(len(ids), room if done == 0 else done + room - 1)
        start = 0 if done == 0 else end - room if end == len(ids) else done - 1
        yield tuple(ids[start:end]), done - start
        done = end


def _ids(policy: Policy, text: str) -> tuple[int, ...]:
    """Tokens of an answer without the one that ends it."""
    return tuple(policy.slot.completion_ids(text)[:-1]) if text.strip() else ()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _query(turns: tuple[Message, ...], place: int) -> Query:
    return Query(turns, index=place, place=f"request {place}")


def _added(
    policy: Policy, prompt: Prompt, pieces: Sequence[_Piece], count: int, token_budget: int
) -> list[Likelihood]:
    """What the pieces of each answer give together."""
    totals, greedy = [0.0] * count, [True] * count
    if pieces:
        prefix = policy.prefix(prompt)
        for piece, logprobs, best in _scored(policy, prompt, prefix, pieces, token_budget):
            totals[piece.answer] += float(logprobs[piece.first :].double().sum())
            greedy[piece.answer] &= bool(best[piece.first :].all())
    return [Likelihood(*each) for each in zip(totals, greedy, strict=True)]


def _scored(
    policy: Policy,
    prompt: Prompt,
    prefix: PrefixKV,
    pieces: Sequence[_Piece],
    token_budget: int,
) -> Iterator[tuple[_Piece, Tensor, Tensor]]:
    """Log-probability of each token of each piece, and whether it is the most likely one."""
    groups: dict[str, list[_Piece]] = {}
    for piece in pieces:
        groups.setdefault(repr(piece.query.messages), []).append(piece)
    together = list(groups.values())
    queries = [len(policy.query_ids(own[0].query, prompt)) for own in together]
    lengths = [[len(piece.ids) for piece in own] for own in together]
    for micro in pack(queries, lengths, token_budget):
        chosen = [[together[g][i] for i in places] for g, places in micro.rows]
        tree = policy.tree(
            [own[0].query for own in chosen],
            [[Completion(piece.ids, (), "", False) for piece in own] for own in chosen],
            prefix,
            prompt,
        )
        with policy.whole_ends():
            scores = policy.logprobs(tree, prefix)
            best = scores.unflatten(_is_best(policy, scores.states, tree.targets).float())
        flat = [piece for own in chosen for piece in own]
        for piece, row, own_best in zip(flat, scores.logprobs, best, strict=True):
            yield piece, row[: len(piece.ids)], own_best[: len(piece.ids)] > 0


def _is_best(policy: Policy, states: Tensor, targets: Tensor) -> Tensor:
    """Bool [M]: whether each target is the most likely token, a few rows of logits at a time."""
    found = [
        head_logits(rows, policy.forward.head).argmax(dim=1) == own
        for rows, own in zip(states.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True)
    ]
    return torch.cat(found)
