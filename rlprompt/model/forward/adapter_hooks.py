"""Linear layers of a base that an adapter may change, and how: by hooks, or beside their products.

A hook leaves module and weight as they are, so that names, bytes and fingerprint of the base stay,
and it acts on `PackedLinear` as on `nn.Linear`. It acts where a layer's module is called: code that
reads weights past the modules must not run under an adapter. What is of low rank is added by the
C++ kernels where these multiply a layer (`PackedLinear.addition`), with a hook's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from rlprompt.types import LinearShape, LowRank

InputHook = Callable[[Tensor], Tensor]
"""Input [..., in] of a layer -> what the layer gets in its place."""
OutputHook = Callable[[Tensor, Tensor], Tensor]
"""Input [..., in] and output [..., out] of a layer -> the output in its place."""


def linear_shapes(model: nn.Module) -> dict[str, LinearShape]:
    """The shape of every linear layer inside the layers of a decoder, by full name.

    The LM head is not one: its input is what every other part of rlprompt calls hidden states.
    """
    shapes = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        inside = any(part.isdecimal() for part in name.split("."))
        if inside and hasattr(module, "in_features") and isinstance(weight, Tensor):
            # Not the weight's shape: a sharded one is empty.
            shapes[name] = LinearShape(int(module.out_features), int(module.in_features))
    return shapes


def attach_hooks(
    model: nn.Module, inputs: Mapping[str, InputHook], outputs: Mapping[str, OutputHook]
) -> Callable[[], None]:
    """Hook layers by full module name; the result takes all hooks off again."""
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_on_input(hook))
        for name, hook in inputs.items()
    ]
    handles += [
        model.get_submodule(name).register_forward_hook(_on_output(hook))
        for name, hook in outputs.items()
    ]

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach


def attach_low_rank(model: nn.Module, additions: Mapping[str, LowRank]) -> Callable[[], None]:
    """Add to the outputs of layers by full name; the result takes everything off again."""
    modules = {name: model.get_submodule(name) for name in additions}
    beside: dict[str, Any] = {
        name: module
        for name, module in modules.items()
        if getattr(module, "can_add", False) and getattr(module, "addition", None) is None
    }
    for name, module in beside.items():
        module.addition = additions[name]
    hooks = {name: _adding(part) for name, part in additions.items() if name not in beside}
    take_off = attach_hooks(model, {}, hooks)

    def detach() -> None:
        take_off()
        for module in beside.values():
            module.addition = None

    return detach


def _adding(addition: LowRank) -> OutputHook:
    def add(x: Tensor, out: Tensor) -> Tensor:
        inner = functional.linear(x, addition.down.to(x.dtype)) * addition.scale
        return out + functional.linear(inner, addition.up.to(x.dtype))

    return add


def _on_input(hook: InputHook) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    return lambda module, arguments: hook(arguments[0])


def _on_output(hook: OutputHook) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    return lambda module, arguments, output: hook(arguments[0], output)
