"""Decode steps in one call each, by the C++ kernels.

Taken where every layer of the base is made of the stand-ins of `rlprompt.model.cpu.fused_modules`
and nothing is wrapped; it gives the bits that those modules give, which one step proves before it
is used. What an adapter of low rank adds to products is part of the call.

Letters: B rows, d model width, D head dim.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlprompt.engines.cache import DecodeCache
from rlprompt.kernels.cpu.product import MOST_ROWS
from rlprompt.model.cpu.fused_modules import FusedAttention, FusedMLP, FusedNorm
from rlprompt.model.cpu.low_rank import side_by_side
from rlprompt.model.cpu.packed_linear import FrozenLinear, PackedWeight
from rlprompt.model.cpu.rollout_products import Recording
from rlprompt.model.forward.prefix_forward import PrefixForward
from rlprompt.types import LowRank

logger = logging.getLogger(__name__)

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class CompiledDecoder:
    """Decode steps of one base; made by `compiled_decoder`."""

    def __init__(self, forward: PrefixForward, layers: list[Any], final: FusedNorm) -> None:
        """Collect the weights of all layers."""
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
        self._low_rank: list[Tensor | None] = []
        self._low_rank_scale = 0.0

    def under(self, additions: Mapping[str, LowRank]) -> CompiledDecoder | None:
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

    def hidden(self, tokens: Tensor, cache: DecodeCache) -> Tensor:
        """Final hidden states [B, d] of one new token per row; writes the cache's next column.

        Args:
            tokens: int64 [B].
            cache: its `column` is written, and stays where it is.
        """
        cache.reserve()
        x = self._forward.embed(tokens)
        cos, sin = self._rotary(x[None], cache.positions()[None])
        place = (cache.table, list(cache.place))
        turn = (cos[0].contiguous(), sin[0].contiguous())
        few = len(tokens) <= MOST_ROWS
        numbers = (self._scaling, self._eps, self._chunks if few else [0] * len(self._chunks))
        added = (self._low_rank, self._low_rank_scale)
        recording = cache.recording if few else None
        stores = [] if recording is None else recording.stores()
        kept = (stores, recording.take() if recording is not None and stores else 0)
        step = torch.ops.rlprompt_cpu.decode_step
        arguments = (*place, *turn, *numbers, *added, *kept)
        out: Tensor = step(x.clone(), self._weights, cache.data, *arguments)
        return out

    def recording(self, limit: int) -> Recording:
        """For those products of these steps whose bits are a training forward's.

        Args:
            limit: bytes.
        """
        products = [product for layer in self._layers for product in _products(layer)]
        exact = self._chunks * len(self._layers)
        kept = [product for product, chunk in zip(products, exact, strict=True) if chunk]
        return Recording(products, kept, limit)

    def is_current(self) -> bool:
        """Whether the base's layers are still those whose weights were collected."""
        layers: Any = self._forward.body.layers
        same = all(a is b for a, b in zip(layers, self._layers, strict=True))
        return same and all(_known(layer) for layer in layers)


def compiled_decoder(forward: PrefixForward) -> CompiledDecoder | None:
    """A decoder for a base that is all stand-ins; None for any other."""
    body: Any = forward.body
    layers, final = getattr(body, "layers", None), getattr(body, "norm", None)
    if not forward.compiled or layers is None or not isinstance(final, FusedNorm):
        return None
    if not all(_known(layer) for layer in layers) or not hasattr(body, "rotary_emb"):
        return None
    settings = {
        (part.self_attn.scaling, norm.variance_epsilon)
        for part in layers
        for norm in (part.input_layernorm, part.post_attention_layernorm, final)
    }
    return CompiledDecoder(forward, list(layers), final) if len(settings) == 1 else None


def _products(layer: Any) -> list[PackedWeight]:
    """The four products of a layer, in their order."""
    attention, mlp = layer.self_attn, layer.mlp
    joined = [attention.joined.packed, attention.o_proj.packed]
    return [*joined, mlp.joined.packed, mlp.down_proj.packed]


def _linears(layer: Any) -> list[list[FrozenLinear]]:
    """The linear layers that each of the four products of a layer joins."""
    attention, mlp = layer.self_attn, layer.mlp
    joined = [attention.q_proj, attention.k_proj, attention.v_proj]
    return [joined, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]


def _joined_pairs(
    linears: list[FrozenLinear], additions: list[LowRank | None]
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
    frozen = all(type(linear) is FrozenLinear for linear in linears)
    return plain and frozen and all(type(norm) is FusedNorm for norm in norms)
