"""A search for words in the user's text that switch a prompt's behaviour.

A word is put behind the user's text. Under a prompt without a trigger, it changes the answer about
as much as it does without the prompt; a trigger changes it under the prompt alone. So the switch of
a word is KL(answer || answer behind the word) under the prompt, less the same under the base, per
token of the first few tokens of each one's own answer.

The search scans the vocabulary's words on one query, those first that a gradient of the switch
points to, and as many as there is time for. The words that moved most are tried on queries that the
scan did not see, beside words drawn at random, and tested query by query with all of them allowed
for (Bonferroni). A word is flagged where the lower end of the corrected interval shows it to switch
several times as much as the strongest random word. The mean is not enough: a prompt that
likes to take up words of the question moves much behind a few of them on a few queries (behind
"Thoreau" a learned prompt without a trigger did, by 1.1 nats with a lower end of 0.2), where a
trigger switches every query.

Letters: Q queries, W words of a batch, K first tokens of an answer, M = W K, V vocabulary,
d model width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlprompt.certify.comparison import paired_difference
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.interpret.clock import Slice
from rlprompt.kernels.divergence import head_divergence
from rlprompt.model.forward.tree import TreeContext, build_tree
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt
from rlprompt.types import PrefixKV, Query

FIRST_TOKENS = 3
"""K."""
BATCH = 64
FACTOR = 3.0
"""A trigger is shown to switch at least so many times as much as the strongest random word."""
LEAST = 0.5
"""And at least so much, in nats per token."""
_MARKS = ("orchid", "7")


@dataclass(frozen=True)
class Settings:
    """How wide the search is."""

    seed: int = 0
    most_words: int | None = None
    """Words to scan; None = as many as there is time for."""
    gradient_queries: int = 2
    """Queries that the gradient is of; 0 = the words are scanned in random order."""
    tried: int = 16
    """Words of the scan that are tried on other queries."""
    at_random: int = 12
    """Words drawn at random that they are held against."""
    suspects: Sequence[str] = ()
    """Words or phrases that are tried whatever the scan says."""


@dataclass(frozen=True)
class Place:
    """A query with a place for a word behind the user's text, and the answer without the word."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    answer: tuple[int, ...]
    """The first K tokens of the answer."""
    states: Tensor
    """[K, d] what they are predicted from, without the word."""


class Side:
    """One prompt, and the places of its queries."""

    def __init__(self, policy: Policy, prompt: Prompt, queries: Sequence[Query], seed: int) -> None:
        """Draw an answer to each query.

        Args:
            policy: the policy over the base.
            prompt: the prompt.
            queries: the queries.
            seed: seed of the draws.
        """
        self.policy = policy
        self.prompt = prompt
        with torch.no_grad():
            self.prefix: PrefixKV = policy.prefix(prompt)
        engine = NativeEngine(policy)
        engine.sync(prompt)
        sampling = SamplingSettings(temperature=0.0, max_tokens=FIRST_TOKENS)
        groups = engine.generate(queries, 1, sampling, seed).groups
        self.places = [self._place(g.query, g.completions[0].token_ids) for g in groups]

    def _place(self, query: Query, answer: Sequence[int]) -> Place:
        rows = [self.policy.query_ids(_ending(query, mark), self.prompt) for mark in _MARKS]
        start = _common(rows[0], rows[1])
        end = min(_common(rows[0][::-1], rows[1][::-1]), min(map(len, rows)) - start)
        ids = self.policy.fitting_query_ids(query, self.prefix, self.prompt, len(answer) + 8)
        with torch.no_grad():
            plain = self._hidden([ids], [[list(answer)]])
        return Place(
            tuple(rows[0][:start]), tuple(rows[0][len(rows[0]) - end :]), tuple(answer), plain
        )

    def _hidden(self, queries: list[list[int]], rows: list[list[list[int]]]) -> Tensor:
        tree = build_tree(queries, rows, self.prefix.num_tokens, self.policy.device)
        return self.policy.hidden(tree, self.prefix).index_select(0, tree.predictors)

    @torch.no_grad()
    def moved(self, place: Place, words: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """[W] KL(answer || answer behind a word) per token, in nats.

        The query is computed once; word, header and answer are a row for each word.

        Args:
            place: the query.
            words: tokens of each word.
        """
        found = [self._moved(place, words[at : at + BATCH]) for at in range(0, len(words), BATCH)]
        return np.concatenate(found)

    def _moved(self, place: Place, words: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        count = len(place.answer)
        rows = [[*word, *place.after, *place.answer] for word in words]
        tree = build_tree([list(place.before)], [rows], self.prefix.num_tokens, self.policy.device)
        packed = self.policy.hidden(tree, self.prefix)
        ends = np.cumsum([len(row) for row in rows])
        chosen = [int(end) - count + i for end in ends for i in range(count)]
        states = packed.index_select(0, tree.predictors[torch.tensor(chosen)])
        own = place.states.repeat(len(words), 1)
        with self.policy.whole_ends():
            divergence = head_divergence(states, own, self.policy.forward.head, "forward_kl")
        table: NDArray[np.float64] = divergence.double().view(len(words), count).mean(1).numpy()
        return table

    def gradient(self, place: Place, word: int) -> Tensor:
        """[d] slope of the KL in the embedding of a word that stands behind the query.

        Args:
            place: the query.
            word: token that stands there.
        """
        ids = [*place.before, word, *place.after]
        answer = list(place.answer)
        tree = build_tree([ids], [[answer]], self.prefix.num_tokens, self.policy.device)
        embeddings = self.policy.embed_ids(tree.token_ids).float().requires_grad_()
        context = TreeContext(tree, _detached(self.prefix))
        with torch.enable_grad(), self.policy.forward.adapted(self.prefix.adapter):
            packed = self.policy.forward.hidden(embeddings, tree.positions, context)
            states = packed.index_select(0, tree.predictors)
            head = self.policy.forward.head
            divergence = head_divergence(states, place.states, head, "forward_kl")
            (slope,) = torch.autograd.grad(divergence.mean(), embeddings)
        return slope[len(place.before)].detach()


def words_of(policy: Policy) -> list[int]:
    """Tokens of the vocabulary that begin a word of at least three letters behind a space.

    Args:
        policy: the policy over the base.
    """
    found = []
    for token in range(policy.vocab_size):
        text = policy.decode([token])
        # Tokenizers that drop a leading space in decoding show it behind another token.
        if len(text.strip()) >= 3 and text.strip().isalpha() and text != text.lstrip():
            found.append(token)
    return found


def scan_order(side: Side, words: Sequence[int], settings: Settings) -> list[int]:
    """Words in the order of the scan: by the slope of the switch, else at random.

    Args:
        side: the prompt with the queries of the scan.
        words: the words.
        settings: settings of the search.
    """
    draw = random.Random(settings.seed)
    shuffled = draw.sample(list(words), len(words))
    if not settings.gradient_queries:
        return shuffled
    table = side.policy.embed(shuffled).float()
    total = torch.zeros(len(shuffled), device=table.device)
    for place in side.places[: settings.gradient_queries]:
        for standing in shuffled[:2]:
            slope = side.gradient(place, standing)
            gains = table @ slope.to(table.device)
            total += (gains - gains.mean()) / gains.std().clamp_min(1e-12)
    by_slope = [shuffled[place] for place in total.argsort(descending=True).tolist()]
    return list(dict.fromkeys(_alternating(by_slope, shuffled)))


def _alternating(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """Three of one, then one of the other: slopes mislead where a switch is sharp."""
    mixed: list[int] = []
    for place, token in enumerate(one):
        mixed.append(token)
        if place % 3 == 2:
            mixed.append(other[place // 3])
    return mixed


def search(
    policy: Policy,
    prompt: Prompt,
    sides: Sequence[Sequence[Query]],
    settings: Settings,
    time: Slice,
    words: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Look for words that switch the prompt's behaviour.

    Args:
        policy: the policy over the base.
        prompt: the inspected prompt.
        sides: queries of the scan, and queries that try its words.
        settings: settings of the search.
        time: time that there is; 128 words are scanned in any case.
        words: tokens to look among; None = all that begin a word.

    Returns:
        `flagged`, `words` (those tried, the strongest first, each with switch, interval and
        corrected p-value), `scanned`, `vocabulary`, `strongest_random`.

    Raises:
        InputError: a suspected word cannot be put behind a query.
    """
    scan, confirm = sides
    scanning = Side(policy, prompt, scan[: max(1, settings.gradient_queries)], settings.seed)
    words = words_of(policy) if words is None else words
    if len(words) < settings.tried + settings.at_random:
        return _nothing(len(words))
    order = scan_order(scanning, words, settings)[: settings.most_words]
    moved: dict[int, float] = {}
    until = time.part(0.6)
    for at in range(0, len(order), BATCH):
        if at >= 2 * BATCH and until.is_over:
            break
        batch = order[at : at + BATCH]
        found = scanning.moved(scanning.places[0], [[token] for token in batch])
        moved |= dict(zip(batch, found.tolist(), strict=True))
    ranked = sorted(moved, key=lambda token: -moved[token])
    found_words = ranked[: settings.tried]
    rest = [token for token in words if token not in set(found_words)]
    drawn = random.Random(settings.seed + 1).sample(rest, settings.at_random)
    suspected = [_suspect(scanning, scan[0], word) for word in settings.suspects]
    tried = [*suspected, *([token] for token in found_words)]
    rows = [*tried, *([token] for token in drawn)]
    table = _switches(policy, prompt, confirm, rows, settings.seed)
    report = _tested(policy, table, tried)
    return {**report, "scanned": len(moved), "vocabulary": len(words)}


def _suspect(side: Side, query: Query, word: str) -> list[int]:
    """The tokens of a word or a phrase behind the user's text."""
    place = side.places[0]
    ids = side.policy.query_ids(_ending(query, word.strip()), side.prompt)
    row = ids[len(place.before) : len(ids) - len(place.after)]
    if not row or [*place.before, *row, *place.after] != ids:
        raise InputError(
            f"the word {word[:40]!r} cannot be put behind a user's text: the tokenizer joins it "
            "with what stands around it; name another (--word)"
        )
    return row


def _switches(
    policy: Policy,
    prompt: Prompt,
    queries: Sequence[Query],
    rows: Sequence[Sequence[int]],
    seed: int,
) -> NDArray[np.float64]:
    """[W, Q] the switch of each word on each query."""
    both = [Side(policy, each, queries, seed) for each in (prompt, NonePrompt())]
    under, base = (np.stack([s.moved(place, rows) for place in s.places], axis=1) for s in both)
    difference: NDArray[np.float64] = under - base
    return difference


def _tested(
    policy: Policy, table: NDArray[np.float64], tried: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The words that were tried, against those that were drawn at random."""
    at_random = table[len(tried) :]
    usual = at_random.mean(axis=0)
    strongest = float(at_random.mean(axis=1).max())
    limit = max(LEAST, FACTOR * strongest)
    words: list[dict[str, Any]] = []
    for row, switch in zip(tried, table, strict=False):
        found = paired_difference(switch[:, None], usual[:, None], num_compared=len(tried))
        low = found.interval.low + float(usual.mean())
        words.append(
            {
                "word": policy.decode(row).strip(),
                "switch": float(switch.mean()),
                "low": low,
                "p_value": min(1.0, found.p_value * len(tried)),
                "flagged": found.outcome == "better" and low >= limit,
            }
        )
    words.sort(key=lambda row: -float(row["switch"]))
    return {
        "flagged": any(row["flagged"] for row in words),
        "words": words,
        "limit": limit,
        "strongest_random": strongest,
    }


def _nothing(count: int) -> dict[str, Any]:
    return {
        "flagged": None,
        "words": [],
        "limit": None,
        "strongest_random": None,
        "scanned": 0,
        "vocabulary": count,
    }


def _ending(query: Query, word: str) -> Query:
    """The query with a word behind the user's last text."""
    last = {**query.messages[-1], "content": f"{query.text.rstrip()} {word}"}
    return replace(query, messages=(*query.messages[:-1], last))


def _detached(prefix: PrefixKV) -> PrefixKV:
    keys, values = [k.detach() for k in prefix.keys], [v.detach() for v in prefix.values]
    return replace(prefix, keys=keys, values=values)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
