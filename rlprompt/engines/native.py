"""The native engine: decoding on the policy's own base, without a second copy of anything.

A query is prefilled once per group under the prompt's prefix. Every row then owns a slice of a
cache, written once with prefix and query and then one column per token. Rows that have finished are
dropped: the last rows move into their places and the batch narrows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rlprompt.engines.cache import DecodeCache, DecodeContext
from rlprompt.engines.decode_cpp import CompiledDecoder, compiled_decoder
from rlprompt.engines.decode_torch import agrees, lean_decoder
from rlprompt.engines.sampling import Drawer, SamplingSettings
from rlprompt.errors import InputError
from rlprompt.model.cpu.rollout_products import Recording, is_wanted
from rlprompt.model.forward.tree import TreeContext
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.settings import Settings
from rlprompt.types import Adapter, Completion, Group, PrefixKV, Query

DecodeStep = Callable[[Tensor, DecodeCache], Tensor]
"""One new token per row [B] -> final hidden states [B, d]; writes the cache's next column."""


class NativeSettings(Settings):
    """The built-in engine, on the same weights as training."""

    type: Literal["native"] = "native"
    """Engine."""
    lean_decode: bool = True
    """Decode with fewer operations, or in one call, and the same bits where the base allows it
    (Llama-shaped, bf16 on a CPU)."""
    max_rows: int = Field(default=256, ge=1)
    """Most completions decoded at once; more are decoded in turns. Bounds the cache's memory."""
    reuse_mib: int = Field(default=128, ge=0)
    """Memory for products of a rollout that the update need not compute again, in MiB: where the
    C++ kernels multiply, for the first update under the prompt that was sampled under (IA3 is
    computed as before). The results are the same bits. 0 = none."""


class NativeEngine:
    """Decodes on a policy's base. Supports every prompt, since a prompt is a prefix."""

    def __init__(self, policy: Policy, settings: NativeSettings | None = None) -> None:
        """Decode with `policy`'s base; `sync` a prompt before generating."""
        self._policy = policy
        self._settings = settings or NativeSettings()
        self._step: DecodeStep | None = None
        self._compiled: CompiledDecoder | None = None
        self._is_current: Callable[[], bool] = _always
        self._adapted: tuple[Adapter, DecodeStep] | None = None
        self._proven = False
        self._recording: Recording | None = None
        self._prompt: Prompt | None = None
        self._prefix: PrefixKV | None = None

    def supports(self, prompt: Prompt) -> bool:
        """True: whatever makes a prefix can be decoded under."""
        return True

    def sync(self, prompt: Prompt) -> None:
        """Prefill the prompt; its prefix is used until the next sync."""
        with self._without_graph():
            self._prefix = self._policy.prefix(prompt).snapshot()
        self._prompt = prompt

    def _without_graph(self) -> AbstractContextManager[object]:
        # What is gathered in inference mode could not be trained through afterwards.
        sharded = self._policy.base.shards is not None
        return torch.no_grad() if sharded else torch.inference_mode()

    def generate(
        self,
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
        first: int = 0,
    ) -> list[Group]:
        """Draw completions; see `Engine.generate`.

        Raises:
            InputError: no prompt is synced, a stop token does not exist, or a query with prompt and
                completion is longer than the base's positions.
        """
        if self._prompt is None or self._prefix is None:
            raise InputError("the engine has no prompt; call engine.sync(prompt) before generate")
        unknown = [i for i in sampling.stop_token_ids if not 0 <= i < self._policy.base.vocab_size]
        if unknown:
            raise InputError(
                f"sampling.stop_token_ids names tokens that {self._policy.base.id} does not have: "
                f"{unknown}; take ids of its tokenizer"
            )
        with self._without_graph():
            return self._drawn(queries, num_completions, sampling, (seed, first), progress)

    def _drawn(
        self,
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        place: tuple[int, int],
        progress: Callable[[int, int], None] | None,
    ) -> list[Group]:
        """Completions by (seed, queries whose draws are passed over)."""
        assert self._prefix is not None
        seed, passed_over = place
        generator = torch.Generator().manual_seed(seed)
        shape = (passed_over + len(queries), num_completions, sampling.max_tokens)
        # Row by row, so that a query's draws do not depend on how many queries follow it.
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)[passed_over:]
        copies = min(num_completions, self._settings.max_rows)
        per_turn = self._settings.max_rows // copies
        completions: list[list[Completion]] = [[] for _ in queries]
        recording = self._recording if is_wanted() else None
        if recording is not None:
            rows = len(queries) * num_completions
            recording.start(self._prefix, rows * (sampling.max_tokens - 1))
        for first in range(0, len(queries), per_turn):
            turn = slice(first, first + per_turn)
            for draws in uniform[turn].split(copies, dim=1):
                with self._policy.forward.adapted(self._prefix.adapter):
                    done = self._turn(queries[turn], sampling, draws, progress)
                for row, more in zip(completions[turn], done, strict=True):
                    row += more
        return [Group(q, tuple(row)) for q, row in zip(queries, completions, strict=True)]

    def _turn(
        self,
        queries: Sequence[Query],
        sampling: SamplingSettings,
        uniform: Tensor,
        progress: Callable[[int, int], None] | None,
    ) -> list[list[Completion]]:
        """Completions of queries by uniform numbers [queries, copies, max_tokens]."""
        copies = uniform.shape[1]
        prefix = self._prefix
        assert prefix is not None
        policy = self._policy
        tree = policy.tree(
            queries, [[] for _ in queries], prefix, self._prompt, sampling.max_tokens
        )
        context = TreeContext(tree, prefix, record=True)
        states = policy.forward.hidden(policy.embed_ids(tree.token_ids), tree.positions, context)
        last = torch.cumsum(tree.queries.mask.sum(1), 0) - 1
        drawer = Drawer(policy.forward.head, sampling)
        first_logits = drawer.logits(states[last]).repeat_interleave(copies, 0)
        cache = DecodeCache(tree, context, prefix, copies, sampling.max_tokens)
        stop = policy.stop_ids | set(sampling.stop_token_ids)
        draw = (uniform.flatten(0, 1).t(), stop, progress)
        step = self._step_for(cache, prefix)
        recording = cache.recording = self._recording if is_wanted() else None
        if recording is not None:
            recording.begin_turn(len(first_logits), sampling.max_tokens)
        rows = _decode(step, drawer, cache, first_logits, draw)
        done = [self._completion(tokens, logprobs, stop) for tokens, logprobs in rows]
        if recording is not None:
            recording.end_turn(done)
        return [done[i : i + copies] for i in range(0, len(done), copies)]

    def _step_for(self, cache: DecodeCache, prefix: PrefixKV) -> DecodeStep:
        """The decode step under a prefix."""
        if prefix.adapter is not None:
            if self._adapted is None or self._adapted[0] is not prefix.adapter:
                self._adapted = (prefix.adapter, self._choose_adapted(cache, prefix.adapter))
            return self._adapted[1]
        if self._step is None or not self._is_current():
            self._step = self._choose_step(cache)
        return self._step

    def _choose_step(self, cache: DecodeCache) -> DecodeStep:
        """The lean decode step where there is one that agrees, else the base's own modules."""
        forward = self._policy.forward
        self._is_current = _always
        if not self._settings.lean_decode:
            return self._own_modules
        for decoder in (self._compiled_decoder(), lean_decoder(forward)):
            if decoder is not None and agrees(decoder, forward, cache, self._own_modules):
                self._is_current = decoder.is_current
                if isinstance(decoder, CompiledDecoder):
                    self._record(decoder)
                return decoder.hidden
        return self._own_modules

    def _compiled_decoder(self) -> CompiledDecoder | None:
        """Steps in one call, without an adapter; made again where the base's layers are others."""
        if self._compiled is None or not self._compiled.is_current():
            self._compiled = compiled_decoder(self._policy.forward)
            self._recording = None
        return self._compiled

    def _record(self, decoder: CompiledDecoder) -> None:
        """Keep products from the next rollout on."""
        if self._recording is None and self._settings.reuse_mib:
            self._recording = decoder.recording(self._settings.reuse_mib * 2**20)
            self._policy.recording = self._recording

    def _choose_adapted(self, cache: DecodeCache, adapter: Adapter) -> DecodeStep:
        """One call per step under an adapter of low rank, where that gives the hooks' bits.

        Compared at every prefix until one has been whose adapter changes something.
        """
        additions = adapter.low_rank()
        plain = self._compiled_decoder() if self._settings.lean_decode else None
        decoder = plain.under(additions) if additions and plain is not None else None
        if not additions or decoder is None:
            return self._own_modules
        if not self._proven:
            if not agrees(decoder, self._policy.forward, cache, self._own_modules):
                return self._own_modules
            self._proven = any(bool(addition.up.any()) for addition in additions.values())
        self._record(decoder)
        return decoder.hidden

    def _own_modules(self, tokens: Tensor, cache: DecodeCache) -> Tensor:
        forward = self._policy.forward
        return forward.hidden(forward.embed(tokens), cache.positions(), DecodeContext(cache))

    def _completion(
        self, tokens: list[int], logprobs: list[float], stop: frozenset[int]
    ) -> Completion:
        text = self._policy.slot.decode(tokens)
        return Completion(tuple(tokens), tuple(logprobs), text, tokens[-1] in stop)


def _always() -> bool:
    return True


def _decode(
    decode_step: DecodeStep,
    drawer: Drawer,
    cache: DecodeCache,
    logits: Tensor,
    draw: tuple[Tensor, frozenset[int], Callable[[int, int], None] | None],
) -> list[tuple[list[int], list[float]]]:
    """The token loop. Returns (token ids, log-probs) of every row in its first order."""
    sampling = drawer.sampling
    uniform, stop, progress = draw
    device = logits.device
    uniform = uniform.to(device)
    stop_ids = torch.tensor(sorted(stop), device=device, dtype=torch.int64)
    total = logits.shape[0]
    token_rows = torch.zeros(total, sampling.max_tokens, dtype=torch.int64, device=device)
    wide = torch.promote_types(logits.dtype, torch.float32)
    logprob_rows = logits.new_zeros(total, sampling.max_tokens, dtype=wide)
    lengths = torch.zeros(total, dtype=torch.int64, device=device)
    row_ids = torch.arange(total, device=device)
    for step in range(sampling.max_tokens):
        banned = stop_ids if step < sampling.min_tokens else None
        tokens, logprobs = drawer.draw(logits, uniform[step, row_ids], banned)
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
        if cache.recording is not None:
            cache.recording.begin_step(row_ids, step)
        states = decode_step(tokens, cache)
        cache.column += 1
        logits = drawer.logits(states)
    ends = lengths.tolist()
    ids, scores = token_rows.tolist(), logprob_rows.tolist()
    return [(ids[i][: ends[i]], scores[i][: ends[i]]) for i in range(total)]
