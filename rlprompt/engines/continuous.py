"""Continuous batching: rows under any prompts join and leave between two decode steps.

A row's numbers do not depend on the rows beside it, up to what the base's products do (see
docs/serving.md): it is drawn by uniform numbers of its own seed, from a state that only its own
columns went into. An adapter is on for all rows of a forward, so that rows under one are a batch of
their own; all other prompts share one batch.

Letters: B rows, G joining rows, d model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rlprompt.engines.grammar import GrammarFaultError, GrammarRow, JsonGrammar
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.row_cache import RowCache
from rlprompt.engines.sampling import Drawer, SamplingSettings, next_tokens
from rlprompt.engines.token_loop import Decoder
from rlprompt.kernels.cpu.product import MOST_ROWS
from rlprompt.kernels.lm_head import head_logits
from rlprompt.model.cpu.row_blocks import fixed_rows
from rlprompt.model.forward.forest import ForestContext, build_forest
from rlprompt.policy import Policy
from rlprompt.types import Adapter, PrefixKV


@dataclass(frozen=True, eq=False)
class Ask:
    """One request: a conversation under a prompt, and how to answer it."""

    prefix: PrefixKV
    """Of the prompt; the rows keep it however long they take."""
    query_ids: tuple[int, ...]
    """The tokens between the prompt and the completion, at least one."""
    sampling: SamplingSettings
    """How tokens are drawn."""
    seed: int = 0
    """Seed of the draws: equal seeds, and equal numbers of copies and tokens, draw equal answers,
    which are those of `NativeEngine.generate`."""
    copies: int = 1
    """Answers."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens are told with each one that is drawn; None = not even the
    log-probability of that one."""
    grammar: JsonGrammar | None = None
    """What the answers are held to; None = any text."""


class Token(NamedTuple):
    """One token of one answer."""

    ask: Ask
    """What is answered."""
    copy: int
    """Which of the answers, from 0 on."""
    token_id: int
    """The token."""
    logprob: float | None
    """Its natural-log probability under the base and the prompt, at temperature 1; None where it
    was not asked for."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with theirs, the likeliest first."""
    finish: str | None
    """`stop`, or `length` where it is the last token that is allowed; None = more will come."""
    fault: str | None = None
    """Why the answer cannot go on: its grammar has become too much work. The token means nothing
    then, and the row has left."""


@dataclass(eq=False)
class _Row:
    """A row and what it has drawn so far."""

    ask: Ask
    copy: int
    uniform: Tensor
    """float64 [max_tokens]."""
    drawn: int = 0
    grammar: GrammarRow | None = None
    """Where it is in what it is held to."""
    fault: str | None = None
    """Why it cannot go on."""

    def allowed(self, vocab_size: int) -> Tensor:
        """Tokens that it may draw, bool [V]; all of them where it cannot go on."""
        assert self.grammar is not None
        try:
            return self.grammar.allowed()
        except GrammarFaultError as error:
            self.fault = str(error)
            return torch.ones(vocab_size, dtype=torch.bool)

    def push(self, token_id: int) -> None:
        """Take note of what it has drawn."""
        if self.grammar is None or self.fault is not None:
            return
        try:
            self.grammar.push(token_id)
        except GrammarFaultError as error:
            self.fault = str(error)


@dataclass(eq=False)
class _Batch:
    """Rows that are decoded by one forward."""

    adapter: Adapter | None
    cache: RowCache
    rows: list[_Row] = field(default_factory=list)
    states: Tensor | None = None
    """[B, d], what the next tokens are drawn from."""
    decoder: Decoder | None = None
    """What makes its steps; chosen at the first."""

    def keep(self, order: Sequence[int]) -> None:
        """Put rows and states in the order that the cache has now."""
        self.rows = [self.rows[row] for row in order]
        if self.states is not None:
            self.states = self.states[list(order)]


class ContinuousDecoder:
    """Rows that join, draw a token per step and leave; used by one thread."""

    def __init__(self, policy: Policy) -> None:
        """Decode with a policy's base; its own prompt is not used.

        Args:
            policy: the policy over the base, which is not cut up among ranks.
        """
        self.policy = policy
        self._engine = NativeEngine(policy)
        self._block = fixed_rows(policy.base.model)
        self._batches: list[_Batch] = []
        self._drawers: dict[SamplingSettings, Drawer] = {}

    @property
    def num_rows(self) -> int:
        """Rows that have not ended."""
        return sum(len(batch.rows) for batch in self._batches)

    @staticmethod
    def prefilled_at_once(asks: Sequence[Ask]) -> int:
        """How many of the first ones to let join at a time, at least one.

        So few tokens that a step in progress waits for one small forward, and that its products are
        those of each row alone.

        Args:
            asks: the requests that wait, in their order.
        """
        tokens = 0
        for count, ask in enumerate(asks):
            tokens += len(ask.query_ids)
            if count and tokens > MOST_ROWS:
                return count
        return len(asks)

    def join(self, asks: Sequence[Ask]) -> None:
        """Prefill requests together, and let their rows take part in the next step.

        Args:
            asks: the requests; they fit into the base's positions.
        """
        with _without_graph():
            plain = [ask for ask in asks if ask.prefix.adapter is None]
            if plain:
                self._join(self._batch_under(None), plain)
            for ask in asks:
                if ask.prefix.adapter is not None:
                    self._join(self._batch_under(ask.prefix.adapter), [ask])

    def step(self) -> list[Token]:
        """Draw one token in every row; rows that end by it leave."""
        tokens: list[Token] = []
        with _without_graph():
            for batch in self._batches:
                if batch.rows:
                    tokens += self._step(batch)
        self._batches = [batch for batch in self._batches if batch.rows]
        return tokens

    def leave(self, ask: Ask, copy: int | None = None) -> None:
        """Take rows of a request out; the others go on.

        Args:
            ask: the request.
            copy: the only answer that is no longer wanted; None = all.
        """
        for batch in self._batches:
            gone = [
                place
                for place, row in enumerate(batch.rows)
                if row.ask is ask and copy in (None, row.copy)
            ]
            if gone:
                with _without_graph():
                    batch.keep(batch.cache.drop(gone))
        self._batches = [batch for batch in self._batches if batch.rows]

    def clear(self) -> None:
        """Take all rows out."""
        self._batches = []

    def _batch_under(self, adapter: Adapter | None) -> _Batch:
        for batch in self._batches:
            if batch.adapter is adapter:
                return batch
        self._batches.append(_Batch(adapter, RowCache(self._block)))
        return self._batches[-1]

    def _join(self, batch: _Batch, asks: Sequence[Ask]) -> None:
        prefixes = list({id(ask.prefix): ask.prefix for ask in asks}.values())
        places = {id(prefix): place for place, prefix in enumerate(prefixes)}
        # Rows under an adapter stand in a forward under it, where they need no account of it.
        plain = [PrefixKV(prefix.keys, prefix.values) for prefix in prefixes]
        device = self.policy.device
        forest = build_forest(
            [len(ask.query_ids) for ask in asks],
            device,
            [prefix.num_tokens for prefix in prefixes],
            [places[id(ask.prefix)] for ask in asks],
        )
        context = ForestContext(forest, plain)
        ids = torch.tensor([token for ask in asks for token in ask.query_ids], device=device)
        forward = self.policy.forward
        with forward.adapted(batch.adapter):
            states = forward.hidden(self.policy.embed_ids(ids), forest.positions, context)
        last = forest.spans[:, 0] + forest.spans[:, 1] - 1
        batch.cache.join(context, [ask.copies for ask in asks])
        fresh = torch.cat(
            [states[place].expand(ask.copies, -1) for ask, place in zip(asks, last, strict=True)]
        )
        batch.states = fresh if batch.states is None else torch.cat([batch.states, fresh])
        batch.rows += [row for ask in asks for row in _rows(ask)]

    def _step(self, batch: _Batch) -> list[Token]:
        assert batch.states is not None
        tokens, ids = self._draw(batch.rows, batch.states)
        finished = [place for place, token in enumerate(tokens) if token.finish is not None]
        if finished:
            order = batch.cache.drop(finished)
            batch.keep(order)
            ids = ids[order]
        if not batch.rows:
            return tokens
        with self.policy.forward.adapted(batch.adapter):
            batch.cache.reserve()
            if batch.decoder is None:
                batch.decoder = self._engine.decoder_under(batch.adapter, batch.cache)
            beside = ids.new_zeros(batch.cache.num_rows - len(ids))
            batch.states = batch.decoder.hidden(torch.cat([ids, beside]), batch.cache)[: len(ids)]
        batch.cache.advance()
        return tokens

    def _draw(self, rows: Sequence[_Row], states: Tensor) -> tuple[list[Token], Tensor]:
        """The next token of each row, and its id again as a tensor [B]."""
        ids = torch.zeros(len(rows), dtype=torch.int64, device=states.device)
        for sampling, places in _alike(rows):
            drawer = self._drawer(sampling)
            numbers = torch.stack([rows[place].uniform[rows[place].drawn] for place in places])
            numbers = numbers.to(states.device)
            logits = drawer.logits(states[places])
            # The others are drawn as if no row were held to anything: they keep their bits.
            held = [n for n, place in enumerate(places) if rows[place].grammar is not None]
            apart = logits[held] if held else None
            ids[places] = drawer.draw(logits, numbers, None)[0]
            if apart is not None:
                kept = [rows[places[n]] for n in held]
                ids[[places[n] for n in held]] = _draw_held(kept, apart, numbers[held], sampling)
        told = self._logprobs(rows, states, ids)
        tokens = []
        for place, (row, token) in enumerate(zip(rows, ids.tolist(), strict=True)):
            row.drawn += 1
            row.push(token)
            stop = self.policy.stop_ids | set(row.ask.sampling.stop_token_ids)
            is_last = row.drawn >= row.ask.sampling.max_tokens
            finish = "stop" if token in stop else "length" if is_last else None
            logprob, top = told.get(place, (None, ()))
            if row.fault is not None:
                finish = "stop"
            tokens.append(Token(row.ask, row.copy, token, logprob, top, finish, row.fault))
        return tokens, ids

    def _drawer(self, sampling: SamplingSettings) -> Drawer:
        if sampling not in self._drawers:
            if len(self._drawers) >= 64:  # clients may ask for any temperature
                self._drawers.clear()
            self._drawers[sampling] = Drawer(self.policy.forward.head, sampling)
        return self._drawers[sampling]

    def _logprobs(
        self, rows: Sequence[_Row], states: Tensor, ids: Tensor
    ) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
        """What rows are to tell of the distributions that they are drawn from."""
        places = [place for place, row in enumerate(rows) if row.ask.top_logprobs is not None]
        if not places:
            return {}
        scores = head_logits(states[places], self.policy.forward.head).log_softmax(1)
        own = scores.gather(1, ids[places][:, None])[:, 0].tolist()
        most = max(rows[place].ask.top_logprobs or 0 for place in places)
        best = scores.topk(most, dim=1)
        values, tokens = best.values.tolist(), best.indices.tolist()
        told = {}
        for number, place in enumerate(places):
            count = rows[place].ask.top_logprobs or 0
            pairs = zip(tokens[number][:count], values[number][:count], strict=True)
            told[place] = (own[number], tuple(pairs))
        return told


def _draw_held(
    rows: Sequence[_Row], logits: Tensor, numbers: Tensor, sampling: SamplingSettings
) -> Tensor:
    """The next tokens of rows that are held to a grammar, int64 [B], from logits [B, V]."""
    allowed = torch.stack([row.allowed(logits.shape[1]) for row in rows]).to(logits.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return next_tokens(logits.masked_fill(~allowed, -torch.inf), numbers, sampling)[0]


def _without_graph() -> AbstractContextManager[object]:
    return torch.inference_mode()


def _rows(ask: Ask) -> list[_Row]:
    """The rows of a request, each with its numbers."""
    shape = (ask.copies, ask.sampling.max_tokens)
    if ask.sampling.temperature == 0.0:
        uniform = torch.zeros(1, dtype=torch.float64).expand(shape)
    else:
        # The numbers that `NativeEngine.generate` draws one query by.
        generator = torch.Generator().manual_seed(ask.seed)
        uniform = torch.rand((1, *shape), generator=generator, dtype=torch.float64)[0]
    rows = [_Row(ask, copy, uniform[copy]) for copy in range(ask.copies)]
    if ask.grammar is not None:
        for row in rows:
            row.grammar = ask.grammar.begin(ask.sampling.stop_token_ids)
    return rows


def _alike(rows: Sequence[_Row]) -> Iterator[tuple[SamplingSettings, list[int]]]:
    """Rows that are drawn by equal settings, the lengths of their answers apart."""
    found: dict[SamplingSettings, list[int]] = {}
    for place, row in enumerate(rows):
        settings = row.ask.sampling
        alike = settings.model_copy(update={"max_tokens": 1, "min_tokens": 0, "stop_token_ids": ()})
        found.setdefault(alike, []).append(place)
    yield from found.items()
