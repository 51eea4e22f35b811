"""The attention hook: every layer of a frozen base attends through a context that we hand in.

transformers lets a caller register an attention function and passes unknown keyword arguments of
the model's forward through to it. rlprompt registers one function, `rlprompt`; the keyword
`attention_context` carries an object that knows what the tokens of this forward may attend to. The
model's own masks and caches are switched off, so there is one place that decides, whatever the
family.

Letters: B rows, N packed tokens, G groups, Q padded query length, T padded completion length,
P prefix tokens, H heads, H_kv key/value heads, D head dim.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlprompt.errors import InputError
from rlprompt.kernels.cpu.ops import serves_dim, tree_attention
from rlprompt.kernels.dispatch import uses_triton
from rlprompt.kernels.operands import Heads, KeyValue, Packed, Scoring
from rlprompt.kernels.reference import masked_attention
from rlprompt.kernels.self_check import Kind
from rlprompt.model.cpu.rollout_products import ProductRows
from rlprompt.types import PrefixKV

ATTENTION_NAME = "rlprompt"

_IGNORED = frozenset({"position_ids", "cache_position", "use_cache"})
"""Keywords of transformers' attention interface that change nothing here: positions are already in
the keys, and the context owns mask and cache."""


class LayerCall:
    """One layer's request: tensors and the settings that its architecture asks for."""

    __slots__ = ("cpp", "key", "layer", "query", "scaling", "softcap", "value", "window")

    def __init__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        cpp: bool = False,
    ) -> None:
        """Store; query is [B, H, T, D], key and value are [B, H_kv, T, D].

        `cpp` = contexts may use the C++ kernels (`rlprompt.kernels.cpu`).
        """
        self.layer = layer
        self.query, self.key, self.value = query, key, value
        self.scaling = scaling
        self.window = window
        self.softcap = softcap
        plain = window is None and softcap is None and serves_dim(self.query.shape[-1])
        self.cpp = cpp and plain and self.query.dtype == torch.bfloat16

    @property
    def scoring(self) -> Scoring:
        """How scores come about."""
        return Scoring(self.scaling, self.softcap, self.window)

    def is_fused(self, kind: Kind) -> bool:
        """Whether the Triton kernels of a kind serve this layer; see `uses_triton`."""
        like = self.query
        heads = Heads(like.shape[1], self.key.shape[1], like.shape[-1])
        return uses_triton(kind, like.device, like.dtype, heads, self.scoring)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Masked attention with this layer's scaling and soft cap; see `masked_attention`."""
        return masked_attention(query, key, value, mask, self.scaling, self.softcap)


class AttentionContext(Protocol):
    """What the tokens of one forward may attend to, and what is known of their products."""

    @property
    def products(self) -> ProductRows | None:
        """What a rollout has multiplied of this forward; None = all is computed."""
        ...

    def attend(self, call: LayerCall) -> Tensor:
        """The attention output of one layer, [B, H, T, D]."""
        ...


def windowed(mask: Tensor, query_pos: Tensor, key_pos: Tensor, window: int | None) -> Tensor:
    """Restrict a mask to a sliding window: keys at most `window - 1` positions back.

    Args:
        mask: bool [B, T, S].
        query_pos: int64 [B, T] absolute positions.
        key_pos: int64 [B, S].
        window: number of positions seen, the query's own included; None = unlimited.
    """
    if window is None:
        return mask
    return mask & ((query_pos[:, :, None] - key_pos[:, None, :]) < window)


class CausalContext:
    """Plain causal attention of rows without padding, from position 0 or after a prefix.

    Used to prefill a prompt: `keys[l]` and `values[l]` are [B, H_kv, P + T, D] and carry gradients.
    """

    products = None

    def __init__(self, after: PrefixKV | None = None) -> None:
        """Start with nothing kept.

        Args:
            after: P tokens that stand before this forward's own; the rows then are one.
        """
        self._after = after
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.layers: list[tuple[int, int | None]] = []
        """Layer and window of each call."""

    def attend(self, call: LayerCall) -> Tensor:
        """Causal attention to the tokens before and to the call's own."""
        self.layers.append((call.layer, call.window))
        if call.cpp and call.query.shape[0] == 1:
            return self._attend_cpp(call)
        key, value = call.key, call.value
        if self._after is not None:
            key = _joined(self._after.keys[call.layer], key)
            value = _joined(self._after.values[call.layer], value)
        self.keys.append(key)
        self.values.append(value)
        place = torch.arange(key.shape[2], device=key.device)[None]
        own = place[:, key.shape[2] - call.key.shape[2] :]
        mask = place[:, None, :] <= own[:, :, None]
        mask = windowed(mask, own, place, call.window)
        return call.attend(call.query, key, value, mask)

    def _attend_cpp(self, call: LayerCall) -> Tensor:
        """The same of one row by the C++ kernel: a tree of one span."""
        tokens = [t.squeeze(0).transpose(0, 1) for t in (call.query, call.key, call.value)]
        if self._after is None:
            before = KeyValue(call.key[0, :, :0], call.value[0, :, :0])
        else:
            before = KeyValue(self._after.keys[call.layer], self._after.values[call.layer])
        self.keys.append(_joined(before.key, call.key))
        self.values.append(_joined(before.value, call.value))
        span = torch.tensor([[0, call.query.shape[2], 0, 0]])
        packed = Packed(*tokens)
        return tree_attention(packed, before, span, call.scaling).transpose(0, 1)[None]

    def prefix(self) -> PrefixKV:
        """What was kept of the first row, and what stood before it, as a prefix."""
        return PrefixKV([k[0] for k in self.keys], [v[0] for v in self.values])


def _joined(before: Tensor, own: Tensor) -> Tensor:
    """[H_kv, P, D] before [1, H_kv, T, D]."""
    return torch.cat([before.to(own.dtype)[None], own], dim=2)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    attention_context: AttentionContext | None = None,
    cpp_attention: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers; see `AttentionInterface` there."""
    if attention_context is None:
        raise InputError(
            f"{type(module).__name__} called rlprompt's attention without its context: run the "
            "base through a Policy (or load a second copy for other use); if you do, its family "
            "drops the context on the way, so choose another base model"
        )
    unknown = _unknown_features({"attention_mask": attention_mask, **others})
    if unknown:
        raise InputError(
            f"{type(module).__name__} asks for attention features that rlprompt does not implement "
            f"({', '.join(unknown)}); choose a base model without them"
        )
    if key.shape != value.shape:
        raise InputError(
            f"{type(module).__name__} has keys and values of different shapes, which rlprompt does "
            "not support; choose another base model"
        )
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise InputError(f"{type(module).__name__} has no layer_idx; choose another base model")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    call = LayerCall(int(layer), query, key, value, scaling, sliding_window, softcap, cpp_attention)
    out = attention_context.attend(call)
    return out.transpose(1, 2).contiguous(), None


def _unknown_features(given: dict[str, Any]) -> list[str]:
    """Names of keywords that ask for something; a flag that is off asks for nothing.

    `is_causal` is the other way round: attention that is not causal is what we do not have.
    """
    asked = {name for name, value in given.items() if value is not None and value is not False}
    asked -= _IGNORED
    if given.get("is_causal", True) in (True, None):
        asked.discard("is_causal")
    else:
        asked.add("is_causal")
    return sorted(asked)


def register() -> None:
    """Make `rlprompt` known to transformers as an attention implementation; safe to repeat.

    No mask function goes with it: masks belong to the context. transformers then builds none, and
    does not look through the positions first, for which Python would wait for the device.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, attention_function)
