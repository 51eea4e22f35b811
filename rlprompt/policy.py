"""The policy: a frozen base under a prompt.

The prompt's prefix is computed once per update with batch 1; gradients of all micro-batches arrive
summed at its keys and values, and one more backward carries them into the prompt (`SharedPrefix`).

Letters: G groups, B completions, T tokens, M tokens of all completions, P prefix tokens, L layers,
H_kv key/value heads, D head dim, d model width. Masks: True = the position counts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlprompt.errors import InputError
from rlprompt.kernels.lm_head import head_scores
from rlprompt.model.base import FrozenBase, ModelSettings, load_base, verify_unchanged
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.cpu.rollout_products import ProductRows
from rlprompt.model.forward.adapter_hooks import linear_shapes
from rlprompt.model.forward.prefix_forward import PrefixForward
from rlprompt.model.forward.tree import TokenTree, TreeContext, build_tree
from rlprompt.model.sharded.shards import ShardSettings
from rlprompt.prompts.base import EmbeddedPrompt, Prompt
from rlprompt.prompts.target import Target
from rlprompt.types import (
    Adapter,
    Completion,
    KVShape,
    LinearShape,
    Message,
    PrefixKV,
    Query,
)

PREFILLED_AT_ONCE = 4096
"""Tokens of prompts that one forward reads, padding to the longest of them counted."""


@dataclass(frozen=True)
class TokenScores:
    """Per-token results of a policy forward, padded to [B, T]."""

    logprobs: Tensor
    """[B, T] log-probability of each completion token, float32, 0 in the padding."""
    entropy: Tensor
    """[B, T] entropy in nats of the distribution it was drawn from, 0 in the padding."""
    mask: Tensor
    """bool [B, T]."""
    states: Tensor
    """[M, d] final hidden states that the M completion tokens were predicted from, rows behind each
    other, with their graph."""

    def unflatten(self, flat: Tensor) -> Tensor:
        """[M] per-token values -> [B, T], zero in the padding."""
        return flat.new_zeros(self.mask.shape).masked_scatter(self.mask, flat)


class SharedPrefix:
    """A prefix with a gradient account: leaves that micro-batches use, and one backward at the end.

    The leaves are copies in float32 (float64 of a float64 base), so that the sum over micro-batches
    does not round in bf16.
    """

    def __init__(self, made: PrefixKV) -> None:
        """Cut the graph between `made` and the leaves."""
        self._made = made
        self.leaves = PrefixKV(
            [_leaf(key) for key in made.keys],
            [_leaf(value) for value in made.values],
            made.adapter,
        )

    def backward(self, again: PrefixKV | None = None) -> None:
        """Carry the leaves' summed gradients into the prompt's parameters.

        Args:
            again: the same prefix made anew, where the first one was made without a graph.
        """
        source = again or self._made
        pairs = [
            (made, leaf.grad.to(made.dtype))
            for made, leaf in zip(
                [*source.keys, *source.values],
                [*self.leaves.keys, *self.leaves.values],
                strict=True,
            )
            if leaf.grad is not None and made.requires_grad
        ]
        if pairs:  # a rank may have had nothing to do
            torch.autograd.backward([m for m, _ in pairs], [g for _, g in pairs])


def _only_reads(prompt: EmbeddedPrompt) -> bool:
    """Whether its prefix is what its embeddings give: a class derived from it may make another."""
    return getattr(prompt.prefix, "__func__", None) is EmbeddedPrompt.prefix


def _packs(lengths: Mapping[int, int]) -> Iterator[list[int]]:
    """Prompts that are prefilled at once, those of similar length together.

    Args:
        lengths: the number of tokens of each; one without tokens is in no pack.
    """
    pack: list[int] = []
    for place in sorted((p for p, n in lengths.items() if n), key=lambda p: lengths[p]):
        if pack and (len(pack) + 1) * lengths[place] > PREFILLED_AT_ONCE:
            yield pack
            pack = []
        pack.append(place)
    if pack:
        yield pack


def _leaf(made: Tensor) -> Tensor:
    wide = torch.promote_types(made.dtype, torch.float32)
    return made.detach().to(wide, copy=True).requires_grad_()


class Policy:
    """A frozen base, the chat template's slot, and the prompt that is trained."""

    def __init__(self, base: FrozenBase, slot: ChatSlot, prompt: Prompt | None = None) -> None:
        """Join the parts.

        Raises:
            InputError: the base cannot be run exactly (see `PrefixForward`).
        """
        self.base = base
        self.slot = slot
        self.forward = PrefixForward(base)
        self._prompt = prompt
        self._head_prefix: PrefixKV | None = None

    @property
    def prompt(self) -> Prompt:
        """The prompt that is trained or applied."""
        if self._prompt is None:
            raise ValueError("this policy has no prompt yet; set policy.prompt")
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: Prompt) -> None:
        self._prompt = prompt

    def sibling(self) -> Policy:
        """A policy over the same base, without a prompt yet; nothing is loaded or packed again."""
        made = copy.copy(self)
        made._prompt = None
        return made

    # What a run asks of what its prompts are for (prompts.target.Target).

    @property
    def id(self) -> str:
        """The base's id."""
        return self.base.id

    @property
    def identity(self) -> Mapping[str, str]:
        """Fingerprint of the base, and hash of the chat template."""
        return {"base": self.base.fingerprint, "chat template": self.slot.template_hash}

    @property
    def fingerprint(self) -> str | None:
        """Hash over the base's weights when it was loaded."""
        return self.base.fingerprint

    @property
    def template_hash(self) -> str | None:
        """Hash over the chat template."""
        return self.slot.template_hash

    @property
    def endpoint(self) -> Mapping[str, str] | None:
        """None: the base is here."""
        return None

    def verify(self) -> str | None:
        """Prove that the base's weights are those that were loaded; see `verify_unchanged`."""
        return verify_unchanged(self.base)

    def positions(self, prompt: Prompt) -> int | None:
        """Positions that a prompt takes in the slot."""
        return self.prefix_length(prompt) - len(self.head_ids)

    def machine(self) -> dict[str, Any]:
        """Device and dtype of the base."""
        return {
            "device": str(self.device),
            "dtype": str(self.base.dtype).removeprefix("torch."),
        }

    def memory(self) -> dict[str, float | int]:
        """Bytes of the base's weights on this rank and of all there are, and a GPU's peak."""
        base = self.base
        weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
        held: dict[str, float | int] = {"base_bytes": weights, "base_bytes_whole": weights}
        if base.shards is not None:
            held = {
                "base_bytes": base.shards.bytes_on_rank,
                "base_bytes_whole": base.shards.bytes_whole,
            }
        if base.device.type == "cuda":
            held["peak_gpu_mb"] = torch.cuda.max_memory_allocated(base.device) / 2**20
        return held

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        return self.base.device

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a completion."""
        return self.slot.stop_ids | self.base.stop_ids

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed layer by layer in the backward."""
        return self.forward.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.forward.gradient_checkpointing = on

    # What a prompt may ask of us (prompts.base.Conditioner).

    @property
    def head_ids(self) -> Sequence[int]:
        """Tokens before the slot."""
        return self.slot.head_ids

    @property
    def none_head_ids(self) -> Sequence[int]:
        """Tokens before the first user turn when no system message is given."""
        return self.slot.none_head_ids

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens that have a name; embeddings may have unused rows beyond."""
        return min(self.base.vocab_size, len(self.base.tokenizer))

    @property
    def hidden_size(self) -> int:
        """d, the width of an embedding."""
        return self.base.hidden_size

    @property
    def kv_shape(self) -> KVShape:
        """Layers, heads and head dim of its keys and values."""
        return KVShape(self.base.num_layers, self.base.num_kv_heads, self.base.head_dim)

    @property
    def linear_shapes(self) -> Mapping[str, LinearShape]:
        """The shape of every linear layer inside the decoder's layers, by its full name."""
        return linear_shapes(self.base.model)

    def slot_ids(self, text: str) -> list[int]:
        """A text as tokens of the slot."""
        return self.slot.slot_ids(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Tokens as text, without control tokens."""
        return self.slot.decode(token_ids)

    def tail_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens after the slot."""
        return self.slot.tail_ids(messages)

    def none_tail_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens after `none_head_ids`."""
        return self.slot.none_tail_ids(messages)

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Input embeddings [n, d]."""
        return self.forward.embed(token_ids)

    def prefill(
        self,
        embeddings: Tensor,
        after: PrefixKV | None = None,
        adapter: Adapter | None = None,
    ) -> PrefixKV:
        """Keys and values of [n, d] embeddings; see `PrefixForward.prefill`."""
        return self.forward.prefill(embeddings, after, adapter)

    def head_prefix(self) -> PrefixKV:
        """The prefix of the head alone; computed once, without gradient."""
        if self._head_prefix is None:
            # Tensors of inference mode could not take part in a later backward.
            with torch.inference_mode(False), torch.no_grad():
                self._head_prefix = self.prefill(self.embed(self.head_ids))
        return self._head_prefix

    def embedding_rms(self) -> float:
        """Root mean square of the entries of named tokens' embeddings: a soft prompt's scale."""
        mean_square = self._embedding_norms().square().mean() / self.base.hidden_size
        return float(mean_square.sqrt())

    def embedding_norm(self) -> float:
        """Median norm of a named token's embedding."""
        return float(self._embedding_norms().median())

    def _embedding_norms(self) -> Tensor:
        with torch.no_grad():
            norms: Tensor = self.forward.embed(torch.arange(self.vocab_size)).float().norm(dim=1)
        return norms

    # What algorithms, engines and evaluations ask of us.

    def prefix(self, prompt: Prompt | None = None) -> PrefixKV:
        """Keys and values of head and slot, differentiable in the prompt's parameters.

        Args:
            prompt: the policy's own prompt when None.
        """
        return (prompt or self.prompt).prefix(self)

    @torch.no_grad()
    def prefixes(self, prompts: Sequence[Prompt]) -> list[PrefixKV]:
        """Keys and values under each of several prompts, without gradients.

        Prompts that are input embeddings (`EmbeddedPrompt`) are prefilled together, as many at once
        as `PREFILLED_AT_ONCE` allows; others one after the other.

        Args:
            prompts: the prompts, of any kinds and lengths.

        Returns:
            One prefix per prompt, in order.
        """
        embedded = {
            place: prompt.input_embeddings(self)
            for place, prompt in enumerate(prompts)
            if isinstance(prompt, EmbeddedPrompt) and _only_reads(prompt)
        }
        made: dict[int, PrefixKV] = {}
        for places in _packs({place: len(each) for place, each in embedded.items()}):
            if len(places) > 1:
                together = self.forward.prefill_each([embedded[place] for place in places])
                made |= zip(places, together, strict=True)
        return [
            made[place] if place in made else self.prefix(prompt)
            for place, prompt in enumerate(prompts)
        ]

    def shared_prefix(self, prompt: Prompt | None = None) -> SharedPrefix:
        """A prompt's prefix for micro-batches; `finish_prefix` ends with it.

        Args:
            prompt: the policy's own prompt when None.
        """
        # Under shards no graph may be pending while others run: hooks count one run at a time.
        with torch.set_grad_enabled(self.base.shards is None and torch.is_grad_enabled()):
            return SharedPrefix(self.prefix(prompt))

    def finish_prefix(self, shared: SharedPrefix, prompt: Prompt | None = None) -> None:
        """Carry a shared prefix's gradients into the prompt.

        Args:
            shared: what `shared_prefix` gave for the same prompt.
            prompt: the policy's own prompt when None.
        """
        if self.base.shards is None:
            shared.backward()
            return
        shared.backward(self.prefix(prompt))
        self.base.shards.release()

    def whole_ends(self) -> AbstractContextManager[None]:
        """A context in which embedding and LM head are whole, where the base is sharded."""
        shards = self.base.shards
        return nullcontext() if shards is None else shards.ends()

    def prefix_length(self, prompt: Prompt | None = None) -> int:
        """P, the number of positions that head and slot take."""
        with torch.no_grad():
            return self.prefix(prompt).num_tokens

    def query_ids(self, query: Query, prompt: Prompt | None = None) -> list[int]:
        """The tokens between the prompt and the completion."""
        return (prompt or self.prompt).query_ids(self, query.messages)

    def tree(
        self,
        queries: Sequence[Query],
        completions: Sequence[Sequence[Completion]],
        prefix: PrefixKV,
        prompt: Prompt | None = None,
        room: int = 0,
    ) -> TokenTree:
        """Pack queries and their completions under a prompt; see `build_tree`.

        Args:
            queries: the queries, one per group.
            completions: the completions of each group; empty for a prefill.
            prefix: the prefix of the prompt.
            prompt: the policy's own prompt when None.
            room: positions to leave for tokens that are decoded later.

        Raises:
            InputError: a conversation is longer than the base's positions.
        """
        rows = [[list(c.token_ids) for c in group] for group in completions]
        ids = [
            self.fitting_query_ids(query, prefix, prompt, max(map(len, group), default=room))
            for query, group in zip(queries, rows, strict=True)
        ]
        return build_tree(ids, rows, prefix.num_tokens, self.device)

    def fitting_query_ids(
        self, query: Query, prefix: PrefixKV, prompt: Prompt | None = None, room: int = 0
    ) -> list[int]:
        """The tokens between the prompt and the completion, where there is room for all.

        Args:
            query: the query.
            prefix: the prefix of the prompt.
            prompt: the policy's own prompt when None.
            room: positions of the completion.

        Raises:
            InputError: the conversation is longer than the base's positions.
        """
        ids = self.query_ids(query, prompt)
        longest = prefix.num_tokens + len(ids) + room
        if longest > self.forward.max_positions:
            where = query.place or f"query {query.index}"
            raise InputError(
                f"{where} needs {longest} positions with prompt and completion, "
                f"{self.base.id} has {self.forward.max_positions}; shorten the query or "
                "max_tokens"
            )
        return ids

    def hidden(
        self, tree: TokenTree, prefix: PrefixKV, products: ProductRows | None = None
    ) -> Tensor:
        """Final hidden states [N, d] of a tree's packed tokens; see `logprobs`."""
        context = TreeContext(tree, prefix, products=products)
        with self.forward.adapted(prefix.adapter):
            return self.forward.hidden(self.embed_ids(tree.token_ids), tree.positions, context)

    def embed_ids(self, token_ids: Tensor) -> Tensor:
        """Input embeddings of a tensor of ids; they carry no gradient."""
        return self.forward.embed(token_ids).detach()

    def logprobs(
        self,
        tree: TokenTree,
        prefix: PrefixKV,
        temperature: float = 1.0,
        entropy_grad: bool = False,
        products: ProductRows | None = None,
    ) -> TokenScores:
        """Log-probabilities and entropies of all completion tokens of a tree.

        The LM head runs on completion positions only, in chunks; [B, T, V] logits never exist.

        Args:
            tree: packed tokens, built for the same prompt as `prefix`.
            prefix: keys and values, usually `SharedPrefix.leaves`; gradients flow into them.
            temperature: the sampling temperature; log-probabilities are those of the tempered,
                untruncated distribution.
            entropy_grad: whether the entropy takes part in the loss.
            products: what the rollout has multiplied of the tree's tokens, which is not computed
                again; the results are the same bits. None = all is computed.
        """
        states = self.hidden(tree, prefix, products)
        scored = states.index_select(0, tree.predictors)
        out = head_scores(scored, tree.targets, self.forward.head, temperature, entropy_grad)
        mask = tree.target_mask
        return TokenScores(tree.unflatten(out.logprobs), tree.unflatten(out.entropy), mask, scored)

    def hidden_scored(
        self,
        queries: Sequence[Query],
        completions: Sequence[Sequence[Completion]],
        prefix: PrefixKV,
        prompt: Prompt | None = None,
    ) -> Tensor:
        """Final hidden states [M, d] that the completion tokens are predicted from.

        Arguments and errors as for `tree`; the LM head does not run.
        """
        tree = self.tree(queries, completions, prefix, prompt)
        return self.hidden(tree, prefix).index_select(0, tree.predictors)

    def parameters(self) -> list[nn.Parameter]:
        """Everything that trains: the prompt's parameters, never the base's."""
        return self.prompt.parameters()


def require_policy(target: Target) -> Policy:
    """What prompts are learned for, where it is a base that is here.

    Raises:
        InputError: it is elsewhere.
    """
    if not isinstance(target, Policy):
        raise InputError(
            f"{target.id} is behind an endpoint, so no base is here to look into or to answer; use "
            "what works from outputs alone, or a base of your own"
        )
    return target


def open_policy(settings: ModelSettings, sharding: ShardSettings | None = None) -> Policy:
    """A base with its chat slot, and no prompt yet.

    Args:
        settings: the base; a template's path in them is relative to the working directory.
        sharding: how the base is cut up among ranks; None when each holds it whole.

    Raises:
        InputError: see `load_base`, `ChatSlot.from_tokenizer` and `Policy`.
    """
    base = load_base(settings, sharding)
    return Policy(base, ChatSlot.from_tokenizer(base.tokenizer, settings.template))
