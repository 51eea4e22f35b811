"""Norms, attention and gated layers of a frozen bf16 base on a CPU, by the C++ kernels.

A module is replaced only where it is of a known kind and its stand-in gives its results for random
inputs; everything else stays. Stand-ins hold the same parameters and submodules under the same
names, so `state_dict` does not change, and look at their linear layers at every call: where one has
been wrapped (an adapter), they call it instead of the common product. What a rollout has multiplied
before (`rollout_products`) comes with the attention context of a forward.

Letters: N packed tokens, d model width, H heads, H_kv key/value heads, D head dim, I inner width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlprompt.kernels.cpu import ops
from rlprompt.model.cpu.packed_linear import PackedLinear, PackedWeight
from rlprompt.model.cpu.rollout_products import ProductRows
from rlprompt.model.forward.attention import AttentionContext, LayerCall, attention_function

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 5
_TOLERANCE = 0.02
"""Of the largest value: bf16 rounds to 1/256, and sums in another order may round elsewhere."""


class JoinedLinear:
    """Linear layers that share an input, in one product while none of them is wrapped."""

    def __init__(self, layers: list[nn.Module]) -> None:
        """Pack nothing yet."""
        self._layers = layers
        self._packed = PackedWeight(layers)  # type: ignore[arg-type]

    def take_over(self) -> None:
        """Give back what the layers have packed one by one: only a wrapped layer needs that."""
        for layer in self._layers:
            if isinstance(layer, PackedLinear):
                layer.packed.forget()

    def __call__(
        self, x: Tensor, layers: list[nn.Module], products: ProductRows | None = None
    ) -> Tensor:
        """Outputs of `layers` side by side, [..., sum of widths], in fresh memory.

        `products` = what is known of them.
        """
        if self.serves(layers):
            return self._packed.apply(x, products)
        return torch.cat([layer(x) for layer in layers], dim=-1)

    def serves(self, layers: list[nn.Module]) -> bool:
        """Whether these are the layers that were joined, as they were: not wrapped, no hooks."""
        return all(
            a is b and not a._forward_hooks and not a._forward_pre_hooks
            for a, b in zip(layers, self._layers, strict=True)
        )

    @property
    def packed(self) -> PackedWeight:
        """The common weight."""
        return self._packed


class FusedNorm(nn.Module):
    """weight * x / rms(x) in one pass."""

    def __init__(self, norm: nn.Module, eps: float) -> None:
        """Share the weight of `norm`."""
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        return ops.rms_norm(hidden_states, weight, self.variance_epsilon)


class FusedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, mlp: nn.Module) -> None:
        """Share the layers of `mlp`."""
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.joined = JoinedLinear(self._inputs())

    def _inputs(self) -> list[nn.Module]:
        return [self.get_submodule("gate_proj"), self.get_submodule("up_proj")]

    def forward(self, x: Tensor, products: ProductRows | None = None) -> Tensor:
        """[..., d] -> [..., d]; `products` = what is known of the layers' outputs."""
        gates = self.joined(x, self._inputs(), products)
        return _applied(self.get_submodule("down_proj"), ops.silu_mul(gates), products)


class FusedAttention(nn.Module):
    """Rotary attention with q, k and v in one product; attends through the context it is given."""

    def __init__(self, attention: nn.Module, call: LayerCall) -> None:
        """Share the layers of `attention`, which made `call` when probed."""
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        self.layer_idx, self.scaling = call.layer, call.scaling
        self.window, self.softcap = call.window, call.softcap
        self.num_kv_heads = call.key.shape[1]
        self.joined = JoinedLinear(self._inputs())

    def _inputs(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As transformers' attention modules, for one batch row: [1, N, d] -> [1, N, d]."""
        cos, sin = position_embeddings
        products = _products_among(kwargs)
        qkv = self.joined(hidden_states, self._inputs(), products)
        turned = ops.rotary(qkv, cos[0].contiguous(), sin[0].contiguous(), self.num_kv_heads)
        q, k, v = (t.transpose(0, 1)[None] for t in turned)
        kwargs |= {"scaling": self.scaling, "sliding_window": self.window, "softcap": self.softcap}
        kwargs.pop("past_key_values", None)
        out, _ = attention_function(self, q, k, v, attention_mask, **kwargs)
        attended = out.reshape(*hidden_states.shape[:-1], -1)
        return _applied(self.get_submodule("o_proj"), attended, products), None


def _applied(module: nn.Module, x: Tensor, products: ProductRows | None) -> Tensor:
    """The output of a linear layer or an MLP; one that has been wrapped knows of no products."""
    takes = products is not None and isinstance(module, PackedLinear | FusedMLP)
    out: Tensor = module(x, products) if takes else module(x)
    return out


def _products_among(arguments: Mapping[str, Any]) -> ProductRows | None:
    """What the attention context among the arguments of a module brings."""
    context: AttentionContext | None = arguments.get("attention_context")
    return None if context is None else context.products


def _layer_forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A decoder layer of two branches, each behind a norm: sums and norms in one pass.

    Bound to the layer in the place of its own forward, so that everything else about it stays.
    """
    norms = layer.input_layernorm, layer.post_attention_layernorm
    (first, first_eps), (second, second_eps) = ((n.weight, n.variance_epsilon) for n in norms)
    residual, normed = ops.branch_norm(hidden_states, None, first, first_eps)
    attended, _ = layer.self_attn(normed, *args, **kwargs)
    residual, normed = ops.branch_norm(residual, attended, second, second_eps)
    out: Tensor = residual + _applied(layer.mlp, normed, _products_among(kwargs))
    return out


class _Probe:
    """A context that keeps the call and attends to nothing: every token gets its own query."""

    products = None

    def __init__(self) -> None:
        self.call: LayerCall | None = None

    def attend(self, call: LayerCall) -> Tensor:
        self.call = call
        return call.query


def fuse_modules(body: nn.Module) -> int:
    """Replace what the kernels can stand in for, in place.

    Args:
        body: a frozen bf16 decoder on a CPU whose linear layers are `PackedLinear` and whose
            attention is rlprompt's.

    Returns:
        How many modules were replaced.
    """
    replaced = 0
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parent in list(body.modules()):
            for name, child in list(parent.named_children()):
                stand_in = _stand_in(child, body)
                if stand_in is not None:
                    setattr(parent, name, stand_in)
                    replaced += 1
        return replaced + sum(_fuse_layer(layer, body) for layer in body.modules())


def allow_kernel(model: nn.Module) -> None:
    """Let the kernels multiply few rows in all packed layers of a model, after `fuse_modules`."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.packed.allow_kernel()
        elif isinstance(module, FusedAttention | FusedMLP):
            module.joined.packed.allow_kernel()


def _stand_in(module: nn.Module, body: nn.Module) -> nn.Module | None:
    """What may replace a module, or None."""
    kind = type(module).__name__
    try:
        if kind.endswith("RMSNorm"):
            return _norm(module)
        if kind.endswith("MLP"):
            return _mlp(module)
        if kind.endswith("Attention"):
            return _attention(module, body)
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        logger.debug("%s stays as it is: %s", kind, error)
    return None


def _norm(norm: nn.Module) -> nn.Module | None:
    if [name for name, _ in norm.named_parameters()] != ["weight"]:
        return None
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float):
        return None
    weight: Tensor = norm.weight  # type: ignore[assignment]
    x = torch.randn(_PROBE_TOKENS, weight.shape[0]).to(weight.dtype)
    stand_in = FusedNorm(norm, eps)
    return stand_in if _agree(stand_in(x), norm(x)) else None


def _mlp(mlp: nn.Module) -> nn.Module | None:
    children = dict(mlp.named_children())
    if not _frozen(children, ("gate_proj", "up_proj", "down_proj"), ("act_fn",)):
        return None
    probe = torch.randn(_PROBE_TOKENS)
    if not torch.allclose(children["act_fn"](probe), functional.silu(probe)):
        return None
    down: Any = children["gate_proj"]
    x = torch.randn(1, _PROBE_TOKENS, down.in_features).to(down.weight.dtype)
    stand_in = FusedMLP(mlp)
    if not _agree(stand_in(x), mlp(x)):
        return None
    stand_in.joined.take_over()
    return stand_in


def _attention(attention: nn.Module, body: Any) -> nn.Module | None:
    children = dict(attention.named_children())
    if not _frozen(children, ("q_proj", "k_proj", "v_proj", "o_proj"), ()):
        return None
    q_proj: Any = children["q_proj"]
    x = torch.randn(1, _PROBE_TOKENS, q_proj.in_features).to(q_proj.weight.dtype)
    positions = torch.arange(3, 3 + _PROBE_TOKENS)[None]
    rotation = body.rotary_emb(x, positions)

    def run(module: nn.Module) -> tuple[Tensor, LayerCall]:
        probe = _Probe()
        arguments = {"attention_mask": None, "attention_context": probe}
        out: Tensor = module(x, position_embeddings=rotation, **arguments)[0]
        assert probe.call is not None
        return out, probe.call

    expected, theirs = run(attention)
    if rotation[0].shape[-1] != theirs.query.shape[-1]:
        return None
    stand_in = FusedAttention(attention, theirs)
    out, ours = run(stand_in)
    pairs = [(out, expected), (ours.query, theirs.query), (ours.key, theirs.key)]
    pairs.append((ours.value, theirs.value))
    if not all(_agree(a, b) for a, b in pairs):
        return None
    stand_in.joined.take_over()
    return stand_in


def _fuse_layer(layer: nn.Module, body: Any) -> bool:
    """Let a layer that is all stand-ins run by `_layer_forward` if that gives the same bits."""
    children = dict(layer.named_children())
    kinds: dict[str, type[nn.Module]] = {"self_attn": FusedAttention, "mlp": FusedMLP}
    kinds |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), FusedNorm)
    if {name: type(child) for name, child in children.items()} != kinds:
        return False
    norm: Any = children["input_layernorm"]
    x = torch.randn(1, _PROBE_TOKENS, norm.weight.shape[0]).to(norm.weight.dtype)
    rotation = body.rotary_emb(x, torch.arange(3, 3 + _PROBE_TOKENS)[None])
    arguments = {"position_embeddings": rotation, "attention_context": _Probe()}
    try:
        expected = layer(x, attention_mask=None, **arguments)
        ours = _layer_forward(layer, x, attention_mask=None, **arguments)
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        logger.debug("%s runs its own forward: %s", type(layer).__name__, error)
        return False
    if not isinstance(expected, Tensor) or not torch.equal(ours, expected):
        return False
    layer.forward = MethodType(_layer_forward, layer)
    return True


def _frozen(
    children: dict[str, nn.Module], linears: tuple[str, ...], others: tuple[str, ...]
) -> bool:
    """Whether these are all the children, and the linear ones are packed."""
    known = set(children) == {*linears, *others}
    return known and all(type(children[name]) is PackedLinear for name in linears)


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    gap = (ours.float() - theirs.float()).abs().max()
    return bool(gap <= _TOLERANCE * theirs.float().abs().max())
