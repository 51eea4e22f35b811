"""The native engine: decoding on the policy's own base, without a second copy of anything.

A query is prefilled once per group under the prompt's prefix. Every row then owns a slice of a
preallocated cache, written once with prefix and query and then one column per token. Rows that have
finished are dropped: the last rows move into their places and the batch narrows.

Columns of the cache: [prefix | query, right-aligned | completion], so that all rows write the same
column at the same time. Letters: B rows, G groups, L layers, H heads, H_kv key/value heads, P prefix
tokens, Q padded query length, S columns, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rlprompt.engines.sampling import SamplingSettings, next_tokens
from rlprompt.errors import InputError
from rlprompt.kernels.lm_head import head_logits
from rlprompt.model.attention import LayerCall
from rlprompt.model.tree import TokenTree, TreeContext
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.settings import Settings
from rlprompt.types import Completion, Group, PrefixKV, Query


class NativeSettings(Settings):
    """The built-in engine, on the same weights as training."""

    type: Literal["native"] = "native"
    """Engine."""
    max_rows: int = Field(default=256, ge=1)
    """Most completions decoded at once; more are decoded in turns. Bounds the cache's memory."""


class DecodeCache:
    """Keys and values of B rows in one block of memory, and which columns each row sees."""

    def __init__(self, tree: TokenTree, context: TreeContext, prefix: PrefixKV, copies: int,
                 max_tokens: int) -> None:
        """Lay out prefix and queries for `copies` rows per group.

        Args:
            tree: the prefilled queries.
            context: the prefill's context, with recorded query keys and values.
            prefix: the shared prefix.
            copies: completions per group.
            max_tokens: columns to reserve for completions.
        """
        mask = tree.queries.mask
        groups, width = mask.shape
        self.lengths = mask.sum(1).repeat_interleave(copies)  # [B]
        self.column = prefix.num_tokens + width
        self.prefix_tokens = prefix.num_tokens
        self._rows = groups * copies
        layers, (kv_heads, dim) = len(prefix.keys), (prefix.keys[0].shape[0], prefix.keys[0].shape[2])
        columns = self.column + max_tokens
        dtype = context.query_keys[0].dtype
        self._data = torch.empty(
            2 * layers, self._rows, kv_heads, columns, dim, dtype=dtype, device=mask.device
        )
        self._layers = layers
        align = _right_aligned(mask)
        for layer in range(layers):
            for part, shared, own in (
                (layer, prefix.keys[layer], context.query_keys[layer]),
                (layers + layer, prefix.values[layer], context.query_values[layer]),
            ):
                block = self._data[part]
                block[:, :, : self.prefix_tokens] = shared.to(dtype)
                aligned = own.gather(2, align[:, None, :, None].expand(-1, kv_heads, -1, dim))
                block[:, :, self.prefix_tokens : self.column] = aligned.repeat_interleave(copies, 0)
        self.padding = width - self.lengths  # [B] unseen columns between prefix and query
        place = torch.arange(columns, device=mask.device)
        pad_end = self.prefix_tokens + self.padding
        self.seen = (place[None] < self.prefix_tokens) | (place[None] >= pad_end[:, None])
        self.all_seen = bool(self.seen.all())

    @property
    def num_rows(self) -> int:
        """Rows still decoding."""
        return self._rows

    def positions(self) -> Tensor:
        """Absolute position [B] of the column about to be written."""
        return self.column - self.padding[: self._rows]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [B, H_kv, S, D] views."""
        return self._data[layer, : self._rows], self._data[self._layers + layer, : self._rows]

    def drop(self, finished: Tensor) -> Tensor:
        """Drop finished rows.

        Args:
            finished: bool [B].

        Returns:
            int64: which of the present rows stand where from now on.
        """
        remaining = int((~finished).sum())
        order = torch.arange(self._rows, device=finished.device)
        holes = torch.nonzero(finished[:remaining]).flatten()
        movers = remaining + torch.nonzero(~finished[remaining:]).flatten()
        order[holes] = movers
        if holes.numel():
            filled = self.column
            self._data[:, holes, :, :filled] = self._data[:, movers, :, :filled]
            self.padding[holes] = self.padding[movers]
            self.seen[holes] = self.seen[movers]
        self._rows = remaining
        return order[:remaining]


class DecodeContext:
    """Attention of one new token per row over its cache."""

    def __init__(self, cache: DecodeCache) -> None:
        """Attend over `cache`, whose `column` is written by this forward."""
        self._cache = cache
        self._masks: dict[int | None, Tensor | None] = {}

    def attend(self, call: LayerCall) -> Tensor:
        """Write the column, then attend: packed [1, H, B, D] in and out."""
        cache = self._cache
        key, value = cache.layer(call.layer)
        end = cache.column + 1
        key[:, :, cache.column] = call.key[0].transpose(0, 1)
        value[:, :, cache.column] = call.value[0].transpose(0, 1)
        query = call.query[0].transpose(0, 1)[:, :, None]  # [B, H, 1, D]
        out = call.attend(query, key[:, :, :end], value[:, :, :end], self._mask(call.window))
        return out.squeeze(2).transpose(0, 1)[None]

    def _mask(self, window: int | None) -> Tensor | None:
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int | None) -> Tensor | None:
        cache = self._cache
        end = cache.column + 1
        seen = cache.seen[: cache.num_rows, :end]
        if window is not None:
            place = torch.arange(end, device=seen.device)[None]
            padding = cache.padding[: cache.num_rows, None]
            positions = torch.where(place < cache.prefix_tokens, place, place - padding)
            seen = seen & (cache.positions()[:, None] - positions < window)
        elif cache.all_seen:
            return None
        return seen[:, None]


def _right_aligned(mask: Tensor) -> Tensor:
    """Gather index [G, Q] that moves right-padded rows to the right edge."""
    width = mask.shape[1]
    shift = width - mask.sum(1, keepdim=True)
    return (torch.arange(width, device=mask.device)[None] - shift).clamp_min(0)


class NativeEngine:
    """Decodes on a policy's base. Supports every prompt, since a prompt is a prefix."""

    def __init__(self, policy: Policy, settings: NativeSettings | None = None) -> None:
        """Decode with `policy`'s base; `sync` a prompt before generating."""
        self._policy = policy
        self._settings = settings or NativeSettings()
        self._prompt: Prompt | None = None
        self._prefix: PrefixKV | None = None

    def supports(self, prompt: Prompt) -> bool:
        """True: whatever makes a prefix can be decoded under."""
        return True

    def sync(self, prompt: Prompt) -> None:
        """Prefill the prompt; its prefix is used until the next sync."""
        with torch.no_grad():
            self._prefix = self._policy.prefix(prompt)
        self._prompt = prompt

    @torch.no_grad()
    def generate(
        self,
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Group]:
        """Draw completions; see `Engine.generate`.

        Raises:
            InputError: no prompt is synced, or no token can end a completion.
        """
        if self._prompt is None:
            raise InputError("the engine has no prompt; call engine.sync(prompt) before generate")
        total = len(queries) * num_completions
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(sampling.max_tokens, total, generator=generator)
        per_turn = max(1, self._settings.max_rows // num_completions)
        groups: list[Group] = []
        for first in range(0, len(queries), per_turn):
            turn = queries[first : first + per_turn]
            columns = slice(first * num_completions, (first + len(turn)) * num_completions)
            groups += self._turn(turn, num_completions, sampling, uniform[:, columns], progress)
        return groups

    def _turn(
        self,
        queries: Sequence[Query],
        copies: int,
        sampling: SamplingSettings,
        uniform: Tensor,
        progress: Callable[[int, int], None] | None,
    ) -> list[Group]:
        prefix = self._prefix
        assert prefix is not None
        policy = self._policy
        tree = policy.tree(queries, [[] for _ in queries], prefix, self._prompt)
        context = TreeContext(tree, prefix, record=True)
        states = policy.forward.hidden(policy.embed_ids(tree.token_ids), tree.positions, context)
        last = torch.cumsum(tree.queries.mask.sum(1), 0) - 1
        first_logits = head_logits(states[last], policy.forward.head).repeat_interleave(copies, 0)
        cache = DecodeCache(tree, context, prefix, copies, sampling.max_tokens)
        stop = policy.stop_ids | set(sampling.stop_token_ids)
        rows = _decode(policy, cache, first_logits, sampling, (uniform, stop, progress))
        return [
            Group(query, tuple(self._completion(*rows[i * copies + j], stop) for j in range(copies)))
            for i, query in enumerate(queries)
        ]

    def _completion(
        self, tokens: list[int], logprobs: list[float], stop: frozenset[int]
    ) -> Completion:
        text = self._policy.slot.decode(tokens)
        return Completion(tuple(tokens), tuple(logprobs), text, tokens[-1] in stop)


def _decode(
    policy: Policy,
    cache: DecodeCache,
    logits: Tensor,
    sampling: SamplingSettings,
    draw: tuple[Tensor, frozenset[int], Callable[[int, int], None] | None],
) -> list[tuple[list[int], list[float]]]:
    """The token loop. Returns (token ids, log-probs) of every row in its first order."""
    uniform, stop, progress = draw
    device = logits.device
    uniform = uniform.to(device)
    stop_ids = torch.tensor(sorted(stop), device=device, dtype=torch.int64)
    total = logits.shape[0]
    token_rows = torch.zeros(total, sampling.max_tokens, dtype=torch.int64, device=device)
    logprob_rows = torch.zeros(total, sampling.max_tokens, device=device)
    lengths = torch.zeros(total, dtype=torch.int64, device=device)
    row_ids = torch.arange(total, device=device)
    for step in range(sampling.max_tokens):
        banned = stop_ids if step < sampling.min_tokens else None
        tokens, logprobs = next_tokens(logits, uniform[step, row_ids], sampling, banned)
        token_rows[row_ids, step] = tokens
        logprob_rows[row_ids, step] = logprobs
        lengths[row_ids] = step + 1
        if progress is not None:
            progress(step + 1, sampling.max_tokens)
        finished = torch.isin(tokens, stop_ids)
        if bool(finished.any()):
            kept = cache.drop(finished)
            row_ids, tokens = row_ids[kept], tokens[kept]
        if row_ids.numel() == 0 or step + 1 == sampling.max_tokens:
            break
        states = policy.forward.hidden(
            policy.embed_ids(tokens), cache.positions(), DecodeContext(cache)
        )
        cache.column += 1
        logits = head_logits(states, policy.forward.head)
    ends = lengths.tolist()
    ids, scores = token_rows.tolist(), logprob_rows.tolist()
    return [(ids[i][: ends[i]], scores[i][: ends[i]]) for i in range(total)]
