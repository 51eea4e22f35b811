"""Texts one or a few tokens away from a given one, screened by what is known already.

A round takes the gradient at the present text, draws edits whose tokens are among the best at their
place to first order, drops what is no text (`search.vocabulary`), and computes for the rest what
they would make of the completions (`search.surrogate`). The next round starts at the best of them,
so that a proposal may be several tokens away. With the mean log-probability per token of a text
under the base as its fluency, texts are ordered by

    J(text) = S(text) + fluency_weight * fluency(text)

Letters: B completions, N texts, m slot tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlprompt.search.substitution import best_tokens, surrogate, surrogate_slope, tapered
from rlprompt.search.surrogate import Evidence, Forwards, Gradient
from rlprompt.search.vocabulary import Vocabulary

_TRIES = 8
"""Edits drawn per text that is wanted, before a round goes on with fewer."""


@dataclass(frozen=True)
class ProposalRules:
    """How texts are proposed; see `TokensSettings`."""

    candidates: int
    top_k: int
    substitutions: int
    rounds: int
    screen_completions: int
    clip: float
    fluency_weight: float
    min_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Proposal:
    """A text to be tried."""

    token_ids: tuple[int, ...]
    text: str
    origin: str
    """`substituted`, `inserted` or `deleted`, of the last edit; `drawn` without evidence."""
    places: frozenset[int]
    """Where it was edited."""
    value: float
    """J, above that of the text that the search stands at."""


@dataclass(frozen=True)
class _Stand:
    """A text that edits are drawn for."""

    token_ids: tuple[int, ...]
    places: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Judge:
    """What texts are compared by."""

    evidence: Evidence
    """With weights that hold the taper of each completion."""
    reference: Tensor
    """[B] mean log-probability per token under the text that the search stands at."""
    clip: float

    def slope(self, places: Tensor, logprobs: Tensor) -> Tensor:
        """What completions [b] count for in the gradient at a text; see `surrogate_slope`."""
        reference, weights = self.reference[places], self.evidence.weights[places]
        return surrogate_slope(logprobs, reference, weights, self.clip)


class Proposer:
    """Makes candidates of what is known."""

    def __init__(self, forwards: Forwards, vocabulary: Vocabulary, rules: ProposalRules) -> None:
        """Join the parts."""
        self._forwards = forwards
        self._vocabulary = vocabulary
        self._rules = rules

    def propose(
        self, token_ids: Sequence[int], evidence: Evidence | None, known: Collection[str], seed: str
    ) -> list[Proposal]:
        """The most promising texts near a given one, best first; of equals, edited elsewhere.

        Args:
            token_ids: the slot tokens of the text that the search stands at.
            evidence: completions that tell texts apart; None = nothing does, and only fluency is
                looked at.
            known: texts that were tried before and are not proposed again.
            seed: seed of the draw.
        """
        draw = random.Random(seed)
        stand = _Stand(tuple(token_ids))
        gradient, judge = self._begin(stand, evidence)
        pool: dict[str, Proposal] = {}
        rounds = self._rules.rounds if judge is not None else 1
        for number in range(rounds):
            if number and judge is not None:
                gradient = self._forwards.gradient(stand.token_ids, judge.evidence, judge.slope)
            edits = self._edits(stand, gradient, [*known, *pool], draw)
            pool |= {each.text: each for each in self._valued(edits, tuple(token_ids), judge)}
            best = max(pool.values(), key=lambda each: each.value, default=None)
            if best is None or best.value <= 0.0 or best.token_ids == stand.token_ids:
                break
            stand = _Stand(best.token_ids, best.places)
        return _varied(list(pool.values()), self._rules.candidates)

    def _begin(
        self, stand: _Stand, evidence: Evidence | None
    ) -> tuple[Gradient | None, _Judge | None]:
        """The gradient at the text, by all completions, and the judge, which has the weightiest."""
        if evidence is None:
            return None, None

        def weigh(places: Tensor, logprobs: Tensor) -> Tensor:
            known = evidence.sampling_logprobs[places]
            return tapered(evidence.weights[places], logprobs, known)

        gradient = self._forwards.gradient(stand.token_ids, evidence, weigh)
        count = min(self._rules.screen_completions, len(gradient.weights))
        chosen = sorted(gradient.weights.abs().topk(count).indices.tolist())
        # Still parts of the mean over all of them.
        share = gradient.weights[chosen] * count / len(gradient.weights)
        kept = evidence.only(chosen, share)
        return gradient, _Judge(kept, gradient.logprobs[chosen], self._rules.clip)

    def _scores(self, stand: _Stand, gradient: Gradient | None) -> Tensor:
        """[m, V] what a token at each place is worth to first order, up to a constant per place."""
        count = len(stand.token_ids)
        scores = torch.zeros(count, len(self._vocabulary.allowed))
        if gradient is not None:
            scores += gradient.one_hot.cpu().to(scores)
        if self._rules.fluency_weight:
            # Its own probability; what it does to that of later tokens the screening shows.
            likely = self._forwards.next_logprobs(stand.token_ids)
            scores += self._rules.fluency_weight / count * likely
        return scores

    def _edits(
        self, stand: _Stand, gradient: Gradient | None, known: Collection[str], draw: random.Random
    ) -> list[Proposal]:
        """Different texts, each one edit away; `value` is not known yet."""
        rules, ids = self._rules, stand.token_ids
        present = torch.tensor(ids)
        best = best_tokens(
            self._scores(stand, gradient), self._vocabulary.allowed, present, rules.top_k
        )
        tokens: list[list[int]] = best.tolist()
        found: dict[str, Proposal] = {}
        taken = set(known)
        for _ in range(_TRIES * rules.substitutions):
            if len(found) == rules.substitutions:
                break
            edit = self._edit(stand, tokens, draw)
            text = None if edit is None else self._vocabulary.text_of(edit.token_ids)
            if edit is None or text is None or text in taken:
                continue
            taken.add(text)
            origin = edit.origin if gradient is not None else "drawn"
            found[text] = Proposal(edit.token_ids, text, origin, edit.places, 0.0)
        return list(found.values())

    def _edit(
        self, stand: _Stand, tokens: Sequence[Sequence[int]], draw: random.Random
    ) -> Proposal | None:
        """One edit, whose text is not known yet; None where no token can be put in."""
        ids, rules = stand.token_ids, self._rules
        kinds = ["substituted"]
        kinds += ["inserted"] * (len(ids) < rules.max_tokens)
        kinds += ["deleted"] * (len(ids) > rules.min_tokens)
        kind = draw.choice(kinds)
        place = draw.randrange(len(ids) + (kind == "inserted"))
        first, after = ids[:place], ids[place + (kind != "inserted") :]
        places = stand.places | {place}
        if kind == "deleted":
            return Proposal((*first, *after), "", kind, places, 0.0)
        # What is put before a token, or after the last one, is chosen as if in its place.
        choice = tokens[min(place, len(ids) - 1)]
        if not choice:
            return None
        return Proposal((*first, draw.choice(choice), *after), "", kind, places, 0.0)

    def _valued(
        self, edits: Sequence[Proposal], origin: Sequence[int], judge: _Judge | None
    ) -> list[Proposal]:
        """The same texts with their values above that of the text that the search stands at."""
        if not edits:
            return []
        rows = [each.token_ids for each in edits]
        values = torch.zeros(len(rows), dtype=torch.float64)
        if judge is not None:
            logprobs = self._forwards.logprobs(rows, judge.evidence, origin)
            weights = judge.evidence.weights
            values += surrogate(logprobs, judge.reference, weights, judge.clip)
        if self._rules.fluency_weight:
            fluency = self._forwards.fluency([origin, *rows])
            values += self._rules.fluency_weight * (fluency[1:] - fluency[0])
        return [
            Proposal(each.token_ids, each.text, each.origin, each.places, value)
            for each, value in zip(edits, values.tolist(), strict=True)
        ]


def _varied(pool: Sequence[Proposal], count: int) -> list[Proposal]:
    """The best ones, such as are edited at the same places only where there are no others."""
    ranked = sorted(pool, key=lambda each: -each.value)
    first: dict[frozenset[int], Proposal] = {}
    for each in ranked:
        first.setdefault(each.places, each)
    chosen = list(first.values())
    rest = [each for each in ranked if each not in chosen]
    return [*chosen, *rest][:count]
