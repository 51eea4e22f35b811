"""A decode step with few operations, for Llama-shaped bases on a bf16 CPU.

With a few dozen rows, a decode step of a small model spends more time starting operations than
computing. This path does the arithmetic of the base's own modules, rounding for rounding, in half
the operations: queries, keys and values in one product, one rotary embedding for both, no module
calls. Sampling log-probabilities are therefore the same bits as without it; fusing activations and
residual sums into the products would round differently and move them by 0.05 nats (docs/log.md).

It is used only for layers whose parts it knows, and only after one step has given the same bits as
the base's own modules. Everything else decodes through `PrefixForward.hidden`.

Letters: B rows, d model width, H heads, H_kv key/value heads, D head dim, S cache columns.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlprompt.engines.cache import DecodeCache
from rlprompt.engines.decode_cpp import CompiledDecoder
from rlprompt.kernels.reference import mask_bias
from rlprompt.model.cpu.packed_linear import FrozenLinear, pack_weight
from rlprompt.model.forward.prefix_forward import PrefixForward

logger = logging.getLogger(__name__)

_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass(frozen=True)
class _Layer:
    """The parts of one layer."""

    norm: nn.Module
    qkv: tuple[Tensor, Tensor | None]
    out: FrozenLinear
    mlp_norm: nn.Module
    gate: FrozenLinear
    up: FrozenLinear
    down: FrozenLinear


class LeanDecoder:
    """Decode steps of one base; made by `lean_decoder`."""

    def __init__(self, forward: PrefixForward, layers: list[_Layer], final: nn.Module) -> None:
        """Keep the parts."""
        self._forward = forward
        self._layers = layers
        self._final = final
        body: Any = forward.body
        self._linears = [linear for layer in body.layers for linear in _linears(layer)]
        base = forward.base
        self._kv_heads, self._dim = base.num_kv_heads, base.head_dim
        self._heads = layers[0].out.in_features // self._dim
        self._rotary = body.rotary_emb
        self._scaling = float(body.layers[0].self_attn.scaling)

    def hidden(self, tokens: Tensor, cache: DecodeCache) -> Tensor:
        """Final hidden states [B, d] of one new token per row; writes the cache's next column.

        Args:
            tokens: int64 [B].
            cache: its `column` is written, and stays where it is.
        """
        cache.reserve()
        x = self._forward.embed(tokens)
        cos, sin = self._rotation(x, cache.positions())
        bias = mask_bias(cache.seen(None), cache.dtype)  # [B, 1, S]
        bias = bias.repeat_interleave(self._kv_heads, 0)
        for index, layer in enumerate(self._layers):
            attended = self._attend(index, layer, x, (cos, sin, bias), cache)
            x = x + layer.out.packed_forward(attended)
            normed = layer.mlp_norm.forward(x)
            gate = functional.silu(layer.gate.packed_forward(normed))
            x = x + layer.down.packed_forward(gate * layer.up.packed_forward(normed))
        states: Tensor = self._final(x)
        return states

    def is_current(self) -> bool:
        """Whether no layer has been changed since its weights were packed."""
        layers: Any = self._forward.body.layers
        linears = [linear for layer in layers for linear in _linears(layer)]
        return all(_known(x) for x in layers) and linears == self._linears

    def _rotation(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Factors [B, 1, D] of x, and of x rolled by half its dims (with the sign of that half)."""
        cos, sin = self._rotary(like[None], positions[None])
        half = self._dim // 2
        sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=1)
        return cos[0, :, None], sin[:, None]

    def _attend(
        self,
        index: int,
        layer: _Layer,
        x: Tensor,
        factors: tuple[Tensor, Tensor, Tensor],
        cache: DecodeCache,
    ) -> Tensor:
        """Attention output [B, H * D] before the output projection."""
        cos, sin, bias = factors
        rows, heads, kv_heads, dim = x.shape[0], self._heads, self._kv_heads, self._dim
        qkv = _packed_linear(layer.norm.forward(x), *layer.qkv).view(rows, -1, dim)
        turned = qkv[:, : heads + kv_heads]
        turned = turned * cos + turned.roll(dim // 2, -1) * sin
        key, value = cache.layer(index)
        key[:, :, cache.column] = turned[:, heads:]
        value[:, :, cache.column] = qkv[:, heads + kv_heads :]
        query = (turned[:, :heads] * self._scaling).view(rows * kv_heads, heads // kv_heads, dim)
        columns = key.shape[2]
        scores = torch.bmm(query, key.view(rows * kv_heads, columns, dim).transpose(1, 2))
        weights = torch.softmax(scores.add_(bias), dim=-1)
        return torch.bmm(weights, value.view(rows * kv_heads, columns, dim)).view(rows, -1)


def lean_decoder(forward: PrefixForward) -> LeanDecoder | None:
    """A lean decoder for a base whose layers have known parts; None for any other.

    The caller compares one step before relying on it (`agrees`).
    """
    body: Any = forward.body
    layers = getattr(body, "layers", None)
    config = forward.base.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    has_window = getattr(config, "sliding_window", None) is not None
    windowed = has_window and (kinds is None or set(kinds) != {"full_attention"})
    if forward.compiled:  # the cache is arranged for the C++ kernels
        return None
    if layers is None or windowed or not all(_known(layer) for layer in layers):
        return None
    if not hasattr(body, "rotary_emb") or not _is_rms_norm(getattr(body, "norm", None)):
        return None
    return LeanDecoder(forward, [_pack_layer(layer) for layer in layers], body.norm)


def agrees(
    decoder: LeanDecoder | CompiledDecoder, forward: PrefixForward, cache: DecodeCache, step: Any
) -> bool:
    """Whether one step gives the bits that the base's own modules give.

    Args:
        decoder: the candidate.
        forward: of the same base.
        cache: at least one row; its next column is overwritten by both.
        step: `step(tokens, cache)`, a decode step through the base's own modules.
    """
    tokens = torch.arange(cache.num_rows, device=forward.device) * 7 % forward.base.vocab_size
    same = torch.equal(step(tokens, cache), decoder.hidden(tokens, cache))
    name = type(decoder).__name__
    logger.info("%s: %s", name, "used" if same else "not used, its bits differ")
    return same


def _known(layer: nn.Module) -> bool:
    """Whether a layer has exactly the parts of Llama's, with packed weights."""
    parts = dict(layer.named_children())
    if set(parts) != _LAYER_PARTS:
        return False
    attention, mlp = dict(parts["self_attn"].named_children()), dict(parts["mlp"].named_children())
    if set(attention) != _ATTENTION_PARTS or set(mlp) != _MLP_PARTS:
        return False
    linears = [*attention.values(), *(mlp[name] for name in _MLP_PARTS - {"act_fn"})]
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
    silu = isinstance(mlp["act_fn"], nn.SiLU) or type(mlp["act_fn"]).__name__ == "SiLUActivation"
    packed = all(isinstance(linear, FrozenLinear) for linear in linears)
    return packed and silu and all(_is_rms_norm(norm) for norm in norms)


def _linears(layer: Any) -> list[nn.Module]:
    return [*layer.self_attn.children(), *layer.mlp.children()]


def _is_rms_norm(norm: Any) -> bool:
    return type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon")


def _pack_layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [part.bias for part in parts]
    bias = None if biases[0] is None else torch.cat(biases)
    weight = pack_weight(torch.cat([part.weight.detach() for part in parts]))
    return _Layer(
        norm=layer.input_layernorm,
        qkv=(weight, bias),
        out=attention.o_proj,
        mlp_norm=layer.post_attention_layernorm,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
    )


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
