"""The native engine: decoding on the policy's own base, without a second copy of anything.

A query is prefilled once per group under its prompt's prefix. Every row then owns a slice of a
cache, written once with prefix and query and then one column per token. Rows that have finished are
dropped: the last rows move into their places and the batch narrows. Rows of one batch may stand
under different prompts, where these are keys and values alone: a step does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from rlprompt.engines.base import Engine, EngineSettings, Generation, require_prompts
from rlprompt.engines.cache import DecodeCache, StepCache
from rlprompt.engines.decode_cpp import CppDecoder, agrees, cpp_decoder
from rlprompt.engines.graph_loop import GraphLoop, graph_loop
from rlprompt.engines.sampling import Drawer, SamplingSettings
from rlprompt.engines.token_loop import Decoder, ModuleDecoder, Progress, Row, TokenLoop
from rlprompt.errors import InputError
from rlprompt.model.cpu.rollout_products import ProductWriter
from rlprompt.model.forward.forest import ForestContext, build_forest
from rlprompt.model.forward.tree import TreeContext
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.types import Adapter, Completion, Group, PrefixKV, Query


class NativeSettings(EngineSettings):
    """The built-in engine, on the same weights as training."""

    type: Literal["native"] = "native"
    """Engine."""
    cpp_decode: bool = True
    """Decode each token by one call of the C++ kernels, where they serve every layer of the base
    (Llama-shaped, bfloat16 on a CPU; `model.cpu_kernels`); false = by the base's own modules. The
    results are the same bits."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Record decode steps on a GPU as CUDA graphs, so that a token is one launch: auto = where a
    step can be recorded, on = an error where it cannot, off = each kernel is launched by itself.
    Rows go in whole buckets, which may round products in another way."""
    max_rows: int = Field(default=256, ge=1, le=65536)
    """Most completions decoded at once, those under all candidates of a search together; more are
    decoded in turns. Bounds the cache's memory."""
    reuse_mib: int = Field(default=128, ge=0, le=2**20)
    """Memory for products of a rollout that the update need not compute again, in MiB: where the
    C++ kernels multiply, for the first update under the prompt that was sampled under (IA3 is
    computed as before). The results are the same bits. 0 = none."""


class NativeEngine(Engine):
    """Decodes on a policy's base. Supports every prompt, since a prompt is a prefix."""

    Settings = NativeSettings
    settings: NativeSettings

    def __init__(
        self,
        policy: Policy,
        settings: NativeSettings | None = None,
        graphs: GraphLoop | None = None,
    ) -> None:
        """Decode with `policy`'s base; `sync` a prompt before generating.

        Args:
            policy: the policy over the base.
            settings: the settings; None = the defaults.
            graphs: a loop of recorded steps on the same base; None = as the device has it.

        Raises:
            InputError: CUDA graphs are asked for, and the base is not where they are.
        """
        super().__init__(policy, settings or NativeSettings())
        self._graphs = graphs or graph_loop(policy.forward, self.settings.cuda_graphs)
        self._modules = ModuleDecoder(policy.forward)
        self._cpp: CppDecoder | None = None
        self._plain: Decoder | None = None
        self._adapted: _AdaptedDecoder | None = None
        self._proven = False
        self._synced: _Under | None = None

    def supports(self, prompt: Prompt) -> bool:
        """True: whatever makes a prefix can be decoded under."""
        return True

    def sync(self, prompt: Prompt) -> None:
        """Prefill the prompt; its prefix is used until the next sync."""
        with self._without_graph():
            self._synced = _Under(prompt, self.policy.prefix(prompt).snapshot())

    def _without_graph(self) -> AbstractContextManager[object]:
        # What is gathered in inference mode could not be trained through afterwards.
        sharded = self.policy.base.shards is not None
        return torch.no_grad() if sharded else torch.inference_mode()

    def generate(
        self,
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
        progress: Progress | None = None,
        first: int = 0,
        keep_products: bool = False,
    ) -> Generation:
        """Draw completions; see `Engine.generate`.

        Raises:
            InputError: no prompt is synced, a stop token does not exist, or a query with prompt and
                completion is longer than the base's positions.
        """
        under = self._checked(sampling)
        uniform = _uniform(first, len(queries), num_completions, sampling.max_tokens, seed)
        tasks = [_Task(under, query) for query in queries]
        with self._without_graph():
            return self._drawn(tasks, uniform, self._loop(sampling, progress), keep_products)

    def generate_some(
        self,
        query: Query,
        chosen: range,
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
        progress: Progress | None = None,
        first: int = 0,
        keep_products: bool = False,
    ) -> Generation:
        """Draw some completions of a query and no others; see `Engine.generate_some`.

        Raises:
            InputError: see `generate`.
        """
        task = _Task(self._checked(sampling), query)
        uniform = _uniform(first, 1, num_completions, sampling.max_tokens, seed)
        own = uniform[:, chosen.start : chosen.stop]
        with self._without_graph():
            return self._drawn([task], own, self._loop(sampling, progress), keep_products)

    def generate_each(
        self,
        prompts: Sequence[Prompt],
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
    ) -> list[Generation]:
        """Draw under several prompts at once; see `Engine.generate_each`.

        As many prompts as `max_rows` has room for are one batch, prefill included. Each prompt with
        an adapter is drawn under alone, since an adapter is on for all rows.

        Raises:
            InputError: there is no prompt, or see `generate`.
        """
        require_prompts(prompts)
        self._check_stop_ids(sampling)
        uniform = _uniform(0, len(queries), num_completions, sampling.max_tokens, seed)
        loop = self._loop(sampling, None)
        at_once = max(1, self.settings.max_rows // max(1, len(queries) * num_completions))
        drawn: list[Generation] = []
        with self._without_graph():
            for first in range(0, len(prompts), at_once):
                turn = prompts[first : first + at_once]
                prefixes = self.policy.prefixes(turn)
                unders = [_Under(*each) for each in zip(turn, prefixes, strict=True)]
                drawn += self._drawn_under(unders, queries, uniform, loop)
        self._synced = replace(unders[-1], prefix=unders[-1].prefix.snapshot())
        return drawn

    def generate_under(
        self,
        prompts: Sequence[Prompt],
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
        progress: Progress | None = None,
        first: int = 0,
    ) -> Generation:
        """Draw each query under its own prompt, all in one batch; see `Engine.generate_under`.

        Each prompt is prefilled once. Where one has an adapter, they are drawn one after the other.

        Raises:
            InputError: there is no prompt, or see `generate`.
        """
        require_prompts(prompts)
        self._check_stop_ids(sampling)
        with self._without_graph():
            different = list({id(prompt): prompt for prompt in prompts}.values())
            prefixes = self.policy.prefixes(different)
            if all(prefix.adapter is None for prefix in prefixes):
                unders = {id(p): _Under(p, f) for p, f in zip(different, prefixes, strict=True)}
                tasks = [_Task(unders[id(p)], q) for p, q in zip(prompts, queries, strict=True)]
                limit = sampling.max_tokens
                uniform = _uniform(first, len(queries), num_completions, limit, seed)
                loop = self._loop(sampling, progress)
                self._synced = None
                return self._drawn(tasks, uniform, loop, keep_products=False)
        return super().generate_under(
            prompts, queries, num_completions, sampling, seed, progress, first
        )

    def _drawn_under(
        self,
        unders: Sequence[_Under],
        queries: Sequence[Query],
        uniform: Tensor,
        loop: TokenLoop,
    ) -> list[Generation]:
        """One generation of the same queries, by the same numbers, per prompt."""
        plain = [under for under in unders if under.prefix.adapter is None]
        batches = [plain, *([under] for under in unders if under.prefix.adapter is not None)]
        found: dict[int, Generation] = {}
        for batch in filter(None, batches):
            tasks = [_Task(under, query) for under in batch for query in queries]
            numbers = uniform.repeat(len(batch), 1, 1)
            groups = self._drawn(tasks, numbers, loop, keep_products=False).groups
            for place, under in enumerate(batch):
                first = place * len(queries)
                found[id(under)] = Generation(groups[first : first + len(queries)])
        return [found[id(under)] for under in unders]

    def generate_one(
        self, query: Query, sampling: SamplingSettings, seed: int, heard: Callable[[int], None]
    ) -> Completion:
        """Draw one completion of one query, and tell its tokens while they are drawn.

        Args:
            query: the conversation to answer.
            sampling: how tokens are drawn.
            seed: seed of the draw; the completion is that of `generate`.
            heard: function of each token id, the stop token included; it may raise to end the draw.

        Raises:
            InputError: see `generate`.
        """
        task = _Task(self._checked(sampling), query)
        uniform = _uniform(0, 1, 1, sampling.max_tokens, seed)
        with self._without_graph():
            loop = self._loop(sampling, None, heard)
            (group,) = self._drawn([task], uniform, loop, keep_products=False).groups
        return group.completions[0]

    def _checked(self, sampling: SamplingSettings) -> _Under:
        """The synced prompt, where these settings can be drawn with."""
        if self._synced is None:
            raise InputError("the engine has no prompt; call engine.sync(prompt) before generate")
        self._check_stop_ids(sampling)
        return self._synced

    def _check_stop_ids(self, sampling: SamplingSettings) -> None:
        """Refuse stop tokens that do not exist."""
        unknown = [i for i in sampling.stop_token_ids if not 0 <= i < self.policy.base.vocab_size]
        if unknown:
            raise InputError(
                f"sampling.stop_token_ids names tokens that {self.policy.base.id} does not have: "
                f"{unknown}; take ids of its tokenizer"
            )

    def _loop(
        self,
        sampling: SamplingSettings,
        progress: Progress | None,
        heard: Callable[[int], None] | None = None,
    ) -> TokenLoop:
        drawer = Drawer(self.policy.forward.head, sampling)
        stop = self.policy.stop_ids | set(sampling.stop_token_ids)
        return TokenLoop(drawer, stop, progress, heard)

    def _drawn(
        self, tasks: Sequence[_Task], uniform: Tensor, loop: TokenLoop, keep_products: bool
    ) -> Generation:
        """Completions by uniform numbers [tasks, completions, max_tokens], turn by turn.

        Args:
            tasks: queries under one prompt, or under several without an adapter.
            uniform: the numbers that tokens are drawn by.
            loop: what draws them.
            keep_products: whether products are kept; the tasks then have one prompt.
        """
        completions: list[list[Completion]] = [[] for _ in tasks]
        writer: ProductWriter | None = None
        adapter = tasks[0].under.prefix.adapter if tasks else None
        with self.policy.forward.adapted(adapter):
            for place, (turn, numbers) in enumerate(_turns(uniform, self.settings.max_rows)):
                cache, states = self._prefill(tasks[turn], numbers.shape[1], loop.max_tokens)
                decoder = self.decoder_under(adapter, cache)
                if keep_products and place == 0 and decoder.store is not None:
                    most_tokens = uniform.shape[0] * uniform.shape[1] * (loop.max_tokens - 1)
                    writer = decoder.store.start(tasks[0].under.prefix, most_tokens)
                flat, rows = numbers.flatten(0, 1).t(), None
                if self._graphs is not None and writer is None:
                    rows = self._graphs.run(loop, cache, states, flat, adapter)
                if rows is None:
                    rows = loop.run(decoder, cache, states, flat, writer)
                done = [self._completion(row, loop.stop) for row in rows]
                if writer is not None:
                    writer.end_turn(done)
                for i, own in enumerate(completions[turn]):
                    own += done[i * numbers.shape[1] : (i + 1) * numbers.shape[1]]
        groups = [Group(t.query, tuple(own)) for t, own in zip(tasks, completions, strict=True)]
        return Generation(tuple(groups), None if writer is None else writer.finish())

    def _prefill(
        self, tasks: Sequence[_Task], copies: int, max_tokens: int
    ) -> tuple[DecodeCache, Tensor]:
        """A cache of `copies` rows per task, and the states [G, d] of their first tokens."""
        policy = self.policy
        unders = list({id(task.under): task.under for task in tasks}.values())
        if len(unders) > 1:
            return self._prefill_forest(unders, tasks, copies, max_tokens)
        prompt, prefix = unders[0].prompt, unders[0].prefix
        queries = [task.query for task in tasks]
        tree = policy.tree(queries, [[] for _ in queries], prefix, prompt, max_tokens)
        context = TreeContext(tree, prefix, keep_queries=True)
        states = policy.forward.hidden(policy.embed_ids(tree.token_ids), tree.positions, context)
        last = torch.cumsum(tree.queries.mask.sum(1), 0) - 1
        return DecodeCache(context, prefix, copies, max_tokens), states[last]

    def _prefill_forest(
        self, unders: Sequence[_Under], tasks: Sequence[_Task], copies: int, max_tokens: int
    ) -> tuple[DecodeCache, Tensor]:
        """The same where each task's query stands behind the prefix of its own prompt."""
        policy = self.policy
        prefixes = [under.prefix for under in unders]
        places = {id(under): place for place, under in enumerate(unders)}
        ids = [
            policy.fitting_query_ids(query, under.prefix, under.prompt, max_tokens)
            for under, query in tasks
        ]
        forest = build_forest(
            [len(each) for each in ids],
            policy.device,
            [prefix.num_tokens for prefix in prefixes],
            [places[id(task.under)] for task in tasks],
        )
        context = ForestContext(forest, prefixes)
        tokens = torch.tensor([token for each in ids for token in each], device=policy.device)
        states = policy.forward.hidden(policy.embed_ids(tokens), forest.positions, context)
        last = forest.spans[:, 0] + forest.spans[:, 1] - 1
        return DecodeCache(context, prefixes[0].cut(0), copies, max_tokens), states[last]

    def decoder_under(self, adapter: Adapter | None, cache: StepCache) -> Decoder:
        """The fastest decoder that gives the bits of the base's own modules.

        Args:
            adapter: the adapter of the rows' prefix, which is on in the layers; None = none is.
            cache: a cache of at least one row, whose next column may be written for a comparison.
        """
        cpp = self._cpp_decoder() if self.settings.cpp_decode else None
        if cpp is None or cache.block % cpp.block:
            return self._modules
        if adapter is not None:
            if self._adapted is None or self._adapted.adapter is not adapter:
                self._adapted = _AdaptedDecoder(adapter, self._choose_adapted(adapter, cache))
            return self._adapted.decoder
        if self._plain is None or not self._plain.is_current():
            self._plain = self._choose(cache)
        return self._plain

    def _choose(self, cache: StepCache) -> Decoder:
        decoder = self._cpp_decoder()
        if decoder is None or not self._agrees(decoder, cache):
            return self._modules
        return decoder

    def _choose_adapted(self, adapter: Adapter, cache: StepCache) -> Decoder:
        """One call per step under an adapter of low rank, where that gives the hooks' bits.

        Compared at every prefix until one has been whose adapter changes something.
        """
        additions = adapter.low_rank()
        plain = self._cpp_decoder()
        decoder = plain.under(additions) if additions and plain is not None else None
        if not additions or decoder is None:
            return self._modules
        if not self._proven:
            if not self._agrees(decoder, cache):
                return self._modules
            self._proven = any(bool(addition.up.any()) for addition in additions.values())
        return decoder

    def _cpp_decoder(self) -> CppDecoder | None:
        """Steps in one call, without an adapter; made again where the base's layers are others."""
        if self._cpp is None or not self._cpp.is_current():
            keep_bytes = self.settings.reuse_mib * 2**20
            self._cpp = cpp_decoder(self.policy.forward, keep_bytes)
        return self._cpp

    def _agrees(self, decoder: CppDecoder, cache: StepCache) -> bool:
        return agrees(decoder, self.policy.forward, cache, self._modules.hidden)

    def _completion(self, row: Row, stop: frozenset[int]) -> Completion:
        text = self.policy.slot.decode(row.token_ids)
        ended = row.token_ids[-1] in stop
        return Completion(tuple(row.token_ids), tuple(row.logprobs), text, ended)


@dataclass(frozen=True)
class _AdaptedDecoder:
    """A decoder and the adapter that it is for."""

    adapter: Adapter
    decoder: Decoder


@dataclass(frozen=True)
class _Under:
    """A prompt, and the prefix that it gave."""

    prompt: Prompt
    prefix: PrefixKV


class _Task(NamedTuple):
    """One query under one prompt."""

    under: _Under
    query: Query


def _uniform(first: int, queries: int, copies: int, max_tokens: int, seed: int) -> Tensor:
    """The numbers in [0, 1) that tokens are drawn by, float64 [queries, copies, max_tokens].

    Row by row, so that a query's draws do not depend on how many queries follow it; those of
    `first` queries are passed over.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (first + queries, copies, max_tokens)
    return torch.rand(shape, generator=generator, dtype=torch.float64)[first:]


def _turns(uniform: Tensor, max_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Which queries are decoded at once, and the numbers [queries, copies, max_tokens] for them."""
    copies = min(uniform.shape[1], max_rows)
    per_turn = max_rows // copies
    for first in range(0, len(uniform), per_turn):
        turn = slice(first, first + per_turn)
        for numbers in uniform[turn].split(copies, dim=1):
            yield turn, numbers
