"""Norms, attention and gated layers of a frozen bf16 base on a CPU, by the C++ kernels.

A module is replaced only where it is of a known kind and its stand-in gives its results, channel
by channel, for random inputs of the sizes that real models have; everything else stays, and the log
says what was tried and differs. Stand-ins hold the same parameters and submodules under the same
names, so `state_dict` does not change, and look at their linear layers at every call: where one has
been wrapped (an adapter), they call it instead of the common product. What a rollout has multiplied
before (`rollout_products`) comes with the attention context of a forward.

Letters: N packed tokens, d model width, H heads, H_kv key/value heads, D head dim, I inner width.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlprompt.kernels.cpu import ops
from rlprompt.model.cpu.packed_linear import PackedLinear, PackedWeight
from rlprompt.model.cpu.paging import page_out
from rlprompt.model.cpu.rollout_products import ProductRows
from rlprompt.model.forward.attention import AttentionContext, LayerCall, attention_function

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 8
_PROBE_SIZES = (0.1, 1.0, 30.0)
"""Of inputs: what a module clamps shows where they are large, what it adds where they are small."""
_TOLERANCE = 0.03
"""Of the size of each output channel: bf16 rounds to 1/256, and sums in another order may round
elsewhere. Never of the largest: beside Gemma's norms, one channel a hundred times as large as the
others hid that the others were wrong."""
_NOISE = 0.01
"""Of the size of the median channel: what one that is nearly zero may differ by."""


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

    def forget(self) -> None:
        """Give the packed copy back; it is made again where it is used again."""
        self._packed.forget()

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


class FusedModules:
    """What `fuse_modules` has replaced in a body."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._modules: list[tuple[nn.Module, str, nn.Module]] = []
        self._layers: list[nn.Module] = []

    def __len__(self) -> int:
        """How many modules were replaced."""
        return len(self._modules) + len(self._layers)

    def replace(self, parent: nn.Module, name: str, stand_in: nn.Module) -> None:
        """Put a stand-in in the place of a child."""
        self._modules.append((parent, name, parent.get_submodule(name)))
        setattr(parent, name, stand_in)

    def bind(self, layer: Any) -> None:
        """Let a layer that is all stand-ins run by one forward."""
        self._layers.append(layer)
        layer.forward = MethodType(_layer_forward, layer)

    def undo(self) -> None:
        """Put every module back."""
        for layer in self._layers:
            del layer.forward
        for parent, name, module in self._modules:
            setattr(parent, name, module)
        self._modules, self._layers = [], []


def fuse_modules(body: nn.Module) -> FusedModules:
    """Replace what the kernels can stand in for, in place.

    Args:
        body: a frozen bf16 decoder on a CPU whose linear layers are `PackedLinear` and whose
            attention is rlprompt's.
    """
    fused = FusedModules()
    differ: Counter[str] = Counter()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parent in list(body.modules()):
            for name, child in list(parent.named_children()):
                stand_in = _stand_in(child, body, differ)
                if stand_in is not None:
                    fused.replace(parent, name, stand_in)
        for layer in list(body.modules()):
            if _is_one_forward(layer, body):
                fused.bind(layer)
    for kind, count in differ.items():
        logger.info("%d %s stay as they are: the CPU kernel computes something else", count, kind)
    return fused


def allow_kernel(model: nn.Module, *, allowed: bool = True) -> None:
    """Let the kernels multiply few rows in all packed layers of a model, after `fuse_modules`.

    Args:
        model: the model, in place.
        allowed: whether they may.
    """
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.packed.allow_kernel(allowed=allowed)
        elif isinstance(module, FusedAttention | FusedMLP):
            module.joined.packed.allow_kernel(allowed=allowed)


class _DiffersError(ValueError):
    """A stand-in computes something else than its module."""


def _stand_in(module: nn.Module, body: nn.Module, differ: Counter[str]) -> nn.Module | None:
    """What may replace a module, or None; `differ` counts those whose stand-in was wrong."""
    kind = type(module).__name__
    try:
        if kind.endswith("RMSNorm"):
            return _norm(module)
        if kind.endswith("MLP"):
            return _mlp(module)
        if kind.endswith("Attention"):
            return _attention(module, body)
    except _DiffersError:
        differ[kind] += 1
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        logger.debug("%s stays as it is: %s", kind, error)
    return None


def _norm(norm: nn.Module) -> nn.Module | None:
    if [name for name, _ in norm.named_parameters()] != ["weight"]:
        return None
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float):
        return None
    # What a norm does with its weight shows best where the weight is small and has both signs.
    other: Any = copy.deepcopy(norm)
    other.weight = nn.Parameter(torch.rand_like(norm.weight) * 2 - 1, requires_grad=False)  # type: ignore[arg-type]
    each: Any
    for each in (other, norm):
        stand_in = FusedNorm(each, eps)
        weight: Tensor = each.weight
        for x in _inputs(int(weight.shape[0]), weight.dtype):
            _require_equal(stand_in(x), each(x))
    return stand_in


def _mlp(mlp: nn.Module) -> nn.Module | None:
    children = dict(mlp.named_children())
    if not _frozen(children, ("gate_proj", "up_proj", "down_proj"), ("act_fn",)):
        return None
    probe = torch.linspace(-12, 12, 97)
    if not torch.allclose(children["act_fn"](probe), functional.silu(probe)):
        return None
    gate: Any = children["gate_proj"]
    stand_in = FusedMLP(mlp)
    for x in _inputs(gate.in_features, gate.weight.dtype):
        _require_equal(stand_in(x[None]), mlp(x[None]))
    stand_in.joined.take_over()
    return stand_in


def _attention(attention: nn.Module, body: Any) -> nn.Module | None:
    children = dict(attention.named_children())
    if not _frozen(children, ("q_proj", "k_proj", "v_proj", "o_proj"), ()):
        return None
    q_proj: Any = children["q_proj"]
    probes = [x[None] for x in _inputs(q_proj.in_features, q_proj.weight.dtype)]
    rotation = body.rotary_emb(probes[0], torch.arange(3, 3 + _PROBE_TOKENS)[None])

    def run(module: nn.Module, x: Tensor) -> tuple[Tensor, LayerCall]:
        probe = _Probe()
        arguments = {"attention_mask": None, "attention_context": probe}
        out: Tensor = module(x, position_embeddings=rotation, **arguments)[0]
        assert probe.call is not None
        return out, probe.call

    first = run(attention, probes[0])[1]
    if rotation[0].shape[-1] != first.query.shape[-1]:
        return None
    stand_in = FusedAttention(attention, first)
    for x in probes:
        (out, ours), (expected, theirs) = run(stand_in, x), run(attention, x)
        _require_equal(out, expected)
        for name in ("query", "key", "value"):
            # Heads of [1, H, N, D] side by side: [N, H * D].
            a, b = (getattr(c, name)[0].transpose(0, 1).flatten(1) for c in (ours, theirs))
            _require_equal(a, b)
    stand_in.joined.take_over()
    return stand_in


def _is_one_forward(layer: nn.Module, body: Any) -> bool:
    """Whether a layer is all stand-ins, and `_layer_forward` gives the same bits."""
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
    return isinstance(expected, Tensor) and torch.equal(ours, expected)


def give_back(model: nn.Module) -> None:
    """Give back what packed copies and mapped weights take in memory; both return where used again.

    Args:
        model: model whose layers are not needed for now.
    """
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, PackedWeight | JoinedLinear):
                value.forget()
    for parameter in model.parameters():
        page_out(parameter.detach())


def _frozen(
    children: dict[str, nn.Module], linears: tuple[str, ...], others: tuple[str, ...]
) -> bool:
    """Whether these are all the children, and the linear ones are packed."""
    known = set(children) == {*linears, *others}
    return known and all(type(children[name]) is PackedLinear for name in linears)


def _inputs(width: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs [N, d] of several sizes, with channels of different sizes as real models have them."""
    channels = torch.randn(width).exp()
    return [
        (size * channels * torch.randn(_PROBE_TOKENS, width)).to(dtype) for size in _PROBE_SIZES
    ]


def _require_equal(ours: Tensor, theirs: Tensor) -> None:
    """Refuse outputs [..., channels] that are not those of the module.

    Raises:
        _DiffersError: some channel is off by more than rounding.
    """
    if ours.shape != theirs.shape:
        raise _DiffersError
    width = theirs.shape[-1]
    wanted = theirs.double().reshape(-1, width)
    size = wanted.square().mean(0).sqrt()
    gap = (ours.double().reshape(-1, width) - wanted).square().mean(0).sqrt()
    if not bool((gap <= _TOLERANCE * size + _NOISE * size.median()).all()):
        raise _DiffersError
