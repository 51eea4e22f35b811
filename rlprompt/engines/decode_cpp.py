"""Decode steps in one call each, by the C++ kernels.

Used where every layer of the base is made of the stand-ins of `rlprompt.model.cpu.fused_modules`
and nothing is wrapped; it gives the bits that those modules give, which one step proves before it
is used (`agrees`). What an adapter of low rank adds to products is part of the call, and so is
keeping products for an update.

Letters: B rows, d model width, D head dim.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlprompt.engines.cache import StepCache
from rlprompt.kernels.cpu.product import MOST_ROWS
from rlprompt.model.cpu.fused_modules import FusedAttention, FusedMLP, FusedNorm
from rlprompt.model.cpu.low_rank import side_by_side
from rlprompt.model.cpu.packed_linear import PackedLinear, PackedWeight
from rlprompt.model.cpu.rollout_products import ProductStore, StepProducts
from rlprompt.model.forward.prefix_forward import PrefixForward
from rlprompt.types import LowRank

logger = logging.getLogger(__name__)

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class CppDecoder:
    """Decode steps of one base; made by `cpp_decoder`."""

    def __init__(
        self, forward: PrefixForward, layers: list[Any], final: FusedNorm, keep_bytes: int
    ) -> None:
        """Collect the weights of all layers.

        Args:
            forward: the base.
            layers: its layers, all of them stand-ins.
            final: the norm behind them.
            keep_bytes: most memory for products of a rollout; 0 = none is kept.
        """
        self._forward = forward
        self._layers = layers
        self._rotary: Any = forward.body.rotary_emb
        self._scaling = float(layers[0].self_attn.scaling)
        self._eps = final.variance_epsilon
        weights: list[Tensor | None] = []
        for layer in layers:
            qkv, output, gates, down = map(_map, _products(layer))
            weights += [layer.input_layernorm.weight, *qkv, *output]
            weights += [layer.post_attention_layernorm.weight, *gates, *down]
        self._weights = [*weights, final.weight]
        products = zip(*map(_products, layers), strict=True)
        chunks = [_common([packed.chunk for packed in same]) for same in products]
        self._chunks = chunks if all(chunks) else [0] * len(chunks)  # a step multiplies in one way
        self.block = max(packed.block_rows or 1 for layer in layers for packed in _products(layer))
        """What the number of rows has to be a multiple of, see `model.cpu.row_blocks`."""
        self._store = self._make_store(keep_bytes)
        self._low_rank: list[Tensor | None] = []
        self._low_rank_scale = 0.0

    def under(self, additions: Mapping[str, LowRank]) -> CppDecoder | None:
        """The same steps under an adapter, whose weights are copied; None = it cannot be added.

        Args:
            additions: what is added to layers, by full name.
        """
        names = {module: name for name, module in self._forward.base.model.named_modules()}
        made = copy.copy(self)
        made._low_rank_scale = next(iter(additions.values())).scale
        made._low_rank = []
        for layer in self._layers:
            for linears in _linears(layer):
                each = [additions.get(names[linear]) for linear in linears]
                if not all(linear.can_add for linear in linears):
                    return None
                made._low_rank += _joined_pairs(linears, each)
        return made

    @property
    def store(self) -> ProductStore | None:
        """Where steps can keep their products, under every adapter; None = they cannot."""
        return self._store

    def hidden(self, tokens: Tensor, cache: StepCache, kept: StepProducts | None = None) -> Tensor:
        """Final hidden states [B, d] of one new token per row; writes the cache's next column.

        Args:
            tokens: int64 [B].
            cache: keys and values; its `column` is written, and stays where it is.
            kept: memory of `store` for what the products give; None = nothing is kept.
        """
        cache.reserve()
        x = self._forward.embed(tokens)
        cos, sin = self._rotary(x[None], cache.positions()[None])
        place = (cache.table, [cache.shared, cache.column])
        turn = (cos[0].contiguous(), sin[0].contiguous())
        few = len(tokens) <= MOST_ROWS
        numbers = (self._scaling, self._eps, self._chunks if few else [0] * len(self._chunks))
        added = (self._low_rank, self._low_rank_scale)
        stores = ([], 0) if kept is None else (list(kept.tensors), kept.first)
        step = torch.ops.rlprompt_cpu.decode_step
        arguments = (*place, *turn, *numbers, *added, *stores)
        out: Tensor = step(x.clone(), self._weights, cache.data, *arguments)
        return out

    def _make_store(self, limit: int) -> ProductStore | None:
        """Memory for those products of these steps whose bits are a training forward's."""
        products = [product for layer in self._layers for product in _products(layer)]
        chunks = self._chunks * len(self._layers)
        exact = [product for product, chunk in zip(products, chunks, strict=True) if chunk]
        if limit:
            logger.info("rollout products: %d of %d can be kept", len(exact), len(products))
        return ProductStore(products, exact, limit) if limit and exact else None

    def is_current(self) -> bool:
        """Whether the base's layers are still those whose weights were collected."""
        layers: Any = self._forward.body.layers
        same = all(a is b for a, b in zip(layers, self._layers, strict=True))
        return same and all(_known(layer) for layer in layers)


def cpp_decoder(forward: PrefixForward, keep_bytes: int = 0) -> CppDecoder | None:
    """A decoder for a base that is all stand-ins; None for any other.

    The caller compares one step before relying on it (`agrees`).

    Args:
        forward: the base.
        keep_bytes: most memory for products of a rollout; 0 = none is kept.
    """
    body: Any = forward.body
    layers, final = getattr(body, "layers", None), getattr(body, "norm", None)
    if not forward.cpp or layers is None or not isinstance(final, FusedNorm):
        return None
    if not all(_known(layer) for layer in layers) or not hasattr(body, "rotary_emb"):
        return None
    settings = {
        (part.self_attn.scaling, norm.variance_epsilon)
        for part in layers
        for norm in (part.input_layernorm, part.post_attention_layernorm, final)
    }
    return CppDecoder(forward, list(layers), final, keep_bytes) if len(settings) == 1 else None


def agrees(
    decoder: CppDecoder,
    forward: PrefixForward,
    cache: StepCache,
    step: Callable[[Tensor, StepCache], Tensor],
) -> bool:
    """Whether one step gives the bits that the base's own modules give.

    Args:
        decoder: the candidate.
        forward: the base that both decode.
        cache: a cache of at least one row; its next column is overwritten by both.
        step: a decode step through the base's own modules.
    """
    tokens = torch.arange(cache.num_rows, device=forward.device) * 7 % forward.base.vocab_size
    same = torch.equal(step(tokens, cache), decoder.hidden(tokens, cache))
    name = type(decoder).__name__
    logger.info("%s: %s", name, "used" if same else "not used, its bits differ")
    return same


def _products(layer: Any) -> list[PackedWeight]:
    """The four products of a layer, in their order."""
    attention, mlp = layer.self_attn, layer.mlp
    joined = [attention.joined.packed, attention.o_proj.packed]
    return [*joined, mlp.joined.packed, mlp.down_proj.packed]


def _linears(layer: Any) -> list[list[PackedLinear]]:
    """The linear layers that each of the four products of a layer joins."""
    attention, mlp = layer.self_attn, layer.mlp
    joined = [attention.q_proj, attention.k_proj, attention.v_proj]
    return [joined, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]


def _joined_pairs(
    linears: list[PackedLinear], additions: list[LowRank | None]
) -> list[Tensor | None]:
    """What an adapter adds to layers whose outputs are joined, as the step reads it."""
    if not any(additions):
        return [None, None, None]
    widths = [linear.out_features for linear in linears]
    joined = side_by_side(widths, additions)
    return [*joined.pairs(), joined.starts]


def _common(chunks: list[int]) -> int:
    """What all layers agree on, or 0."""
    return chunks[0] if len(set(chunks)) == 1 else 0


def _map(packed: PackedWeight) -> list[Tensor | None]:
    return [packed.forward_weight, packed.bias]


def _known(layer: nn.Module) -> bool:
    """Whether a layer is made of unwrapped stand-ins, without windows or soft caps."""
    parts: Any = dict(layer.named_children())
    if set(parts) != set(_PARTS):
        return False
    attention, mlp = parts["self_attn"], parts["mlp"]
    if type(attention) is not FusedAttention or type(mlp) is not FusedMLP:
        return False
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
    linears = [*attention.children(), mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    plain = attention.window is None and attention.softcap is None
    frozen = all(type(linear) is PackedLinear for linear in linears)
    return plain and frozen and all(type(norm) is FusedNorm for norm in norms)
