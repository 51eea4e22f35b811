"""LoRA and IA3 on a frozen base: PEFT's arithmetic and names, by hooks on the base's own layers.

- LoRA (Hu et al., 2021, arXiv 2106.09685): y = W x + alpha / r * B A x, B starts at zero;
- IA3 (Liu et al., 2022, arXiv 2205.05638): y = l * (W x), or y = W (l * x) in the last layer of the
  feed-forward; l starts at one.

PEFT's own injection replaces modules and computes every product of a bf16 model in float32; hooks
leave modules, names and packed weights as they are. Weights are kept in float32 and rounded to the
base's dtype where they meet its activations (IA3's factors, which lie near 1, are not rounded).

Letters: r rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rlprompt.errors import InputError
from rlprompt.model.forward.adapter_hooks import (
    InputHook,
    OutputHook,
    attach_hooks,
    attach_low_rank,
)
from rlprompt.settings import Settings
from rlprompt.types import LinearShape, LowRank

Shapes = Mapping[str, LinearShape]
"""Of linear layers by full name."""


class LoRASettings(Settings):
    """Low-rank matrices beside linear layers."""

    type: Literal["lora"] = "lora"
    """Method."""
    rank: int = Field(default=8, ge=1, le=4096)
    """r, the rank."""
    alpha: float = Field(default=16.0, gt=0.0)
    """The change is scaled by alpha / rank."""
    target_modules: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Layers by the end of their names, such as q_proj; null = every linear layer."""


class IA3Settings(Settings):
    """Factors on the outputs, or inputs, of linear layers."""

    type: Literal["ia3"] = "ia3"
    """Method."""
    target_modules: tuple[str, ...] = Field(default=("k_proj", "v_proj", "down_proj"), min_length=1)
    """Layers by the end of their names."""
    feedforward_modules: tuple[str, ...] = ("down_proj",)
    """Those of them whose input is scaled in place of the output."""

    @model_validator(mode="after")
    def _are_targets(self) -> IA3Settings:
        extra = [name for name in self.feedforward_modules if name not in self.target_modules]
        if extra:
            raise ValueError(
                f"feedforward_modules names {', '.join(extra)}, which target_modules does not; add "
                "it there or remove it"
            )
        return self


class LayerAdapter(ABC):
    """Weights of an adapter by PEFT's names; satisfies `rlprompt.types.Adapter`."""

    peft_type: ClassVar[str]

    def __init__(self, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Keep weights and settings.

        Args:
            weights: the weights, by `<full name of the layer>.<name of the part>`.
            config: what PEFT's adapter_config.json says of the method.

        Raises:
            ValueError: they do not belong to this method.
        """
        self.weights = dict(weights)
        self.config = dict(config)
        self._check()

    @abstractmethod
    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Change the layers of a base; the result undoes it."""

    def low_rank(self) -> Mapping[str, LowRank] | None:
        """What is added to layers, by full name; None = they are changed in another way."""
        return None

    @abstractmethod
    def gated(self) -> list[str]:
        """Names of the weights that a zero multiplies at the start."""

    @abstractmethod
    def needed(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The shapes that the weights must have on layers of these shapes."""

    @abstractmethod
    def scale(self, width: int) -> float:
        """The size of a weight that means something to a base of this width.

        Chosen so that AdamW at one relative rate moves completions by about the same KL as a soft
        prompt's (docs/log.md).
        """

    @abstractmethod
    def change_rms(self) -> float:
        """Root mean square of what is added to weights (LoRA) or factors (IA3)."""

    @abstractmethod
    def _check(self) -> None: ...

    @property
    def layers(self) -> list[str]:
        """Full names of the layers that are changed."""
        part = self._first_part
        return [name.removesuffix(part) for name in self.weights if name.endswith(part)]

    @property
    @abstractmethod
    def _first_part(self) -> str: ...

    def snapshot(self) -> LayerAdapter:
        """A copy without gradients."""
        return type(self)({k: v.detach().clone() for k, v in self.weights.items()}, self.config)

    def peft_config(self, base: str) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json for a base of this id."""
        common = {"peft_type": self.peft_type, "task_type": "CAUSAL_LM", "inference_mode": True}
        return {**common, "base_model_name_or_path": base, "fan_in_fan_out": False, **self.config}


class LoRA(LayerAdapter):
    """`lora_A.weight` [r, in] and `lora_B.weight` [out, r] of each layer."""

    peft_type = "LORA"

    @classmethod
    def create(cls, settings: LoRASettings, shapes: Shapes, seed: int) -> LoRA:
        """A fresh adapter, which changes nothing: A drawn as PEFT draws it, B zero.

        Raises:
            InputError: a target is not there.
        """
        targets = settings.target_modules or sorted({n.rpartition(".")[2] for n in shapes})
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for name, shape in _targeted(shapes, targets).items():
            drawn = torch.rand(settings.rank, shape.inputs, generator=generator)
            weights[f"{name}.lora_A.weight"] = (2.0 * drawn - 1.0) / math.sqrt(shape.inputs)
            weights[f"{name}.lora_B.weight"] = torch.zeros(shape.outputs, settings.rank)
        config = {
            "r": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": list(targets),
        }
        return cls(weights, config)

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Add alpha / r * B A x to the outputs."""
        return attach_low_rank(model, self.low_rank())

    def low_rank(self) -> Mapping[str, LowRank]:
        """A and B of each layer."""
        return {name: LowRank(*self._pair(name), self._scaling) for name in self.layers}

    def gated(self) -> list[str]:
        """Every A."""
        return [name for name in self.weights if name.endswith(".lora_A.weight")]

    def needed(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """A is [r, in], B is [out, r]."""
        rank = int(self.config["r"])
        out: dict[str, tuple[int, ...]] = {}
        for name in self.layers:
            out[f"{name}.lora_A.weight"] = (rank, shapes[name].inputs)
            out[f"{name}.lora_B.weight"] = (shapes[name].outputs, rank)
        return out

    def scale(self, width: int) -> float:
        """Root mean square of a freshly drawn A."""
        return 1.0 / math.sqrt(3.0 * width)

    @torch.no_grad()
    def change_rms(self) -> float:
        """Root mean square of the entries of alpha / r * B A."""
        total, count = 0.0, 0
        for name in self.layers:
            down, up = self._pair(name)
            total += float(((up.t() @ up) * (down @ down.t())).sum())  # |B A|^2 in r x r products
            count += up.shape[0] * down.shape[1]
        return self._scaling * math.sqrt(max(0.0, total) / count)

    @property
    def _scaling(self) -> float:
        return float(self.config["lora_alpha"]) / int(self.config["r"])

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.lora_A.weight"], self.weights[f"{name}.lora_B.weight"]

    @property
    def _first_part(self) -> str:
        return ".lora_A.weight"

    def _check(self) -> None:
        known = {f"{n}.lora_{part}.weight" for n in self.layers for part in "AB"}
        if not self.layers or set(self.weights) != known:
            raise ValueError("the weights are not pairs of lora_A and lora_B")
        features = [name for name in _FOREIGN if self.config.get(name)]
        if self.config.get("bias", "none") != "none":
            features.append("bias")
        if features:
            raise ValueError(f"it uses {', '.join(features)}, which rlprompt does not have")
        rank, alpha = self.config.get("r"), self.config.get("lora_alpha")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"r of its settings is {str(rank)[:40]!r}, not a positive integer")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not alpha > 0:
            raise ValueError(
                f"lora_alpha of its settings is {str(alpha)[:40]!r}, not a positive number"
            )


class IA3(LayerAdapter):
    """`ia3_l` [out, 1], or [1, in] where the input is scaled, of each layer."""

    peft_type = "IA3"

    @classmethod
    def create(cls, settings: IA3Settings, shapes: Shapes, seed: int) -> IA3:
        """A fresh adapter, which changes nothing: factors of one; nothing is drawn.

        Raises:
            InputError: a target is not there.
        """
        del seed
        config = {
            "target_modules": list(settings.target_modules),
            "feedforward_modules": list(settings.feedforward_modules),
        }
        weights = {
            f"{name}.ia3_l": torch.ones(_factor_shape(name, shape, settings.feedforward_modules))
            for name, shape in _targeted(shapes, settings.target_modules).items()
        }
        return cls(weights, config)

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Scale inputs and outputs."""
        inputs: dict[str, InputHook] = {}
        outputs: dict[str, OutputHook] = {}
        for name in self.layers:
            factors = self.weights[f"{name}.ia3_l"].flatten()
            if _ends_with(name, self.config["feedforward_modules"]):
                inputs[name] = _scale_input(factors)
            else:
                outputs[name] = _scale_output(factors)
        return attach_hooks(model, inputs, outputs)

    def gated(self) -> list[str]:
        """None: factors of one let gradients through."""
        return []

    def needed(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """One factor per output, or input."""
        inputs = self.config["feedforward_modules"]
        return {f"{n}.ia3_l": _factor_shape(n, shapes[n], inputs) for n in self.layers}

    def scale(self, width: int) -> float:
        """0.15: factors of all layers multiply."""
        del width
        return 0.15

    @torch.no_grad()
    def change_rms(self) -> float:
        """Root mean square of l - 1."""
        flat = torch.cat([weight.flatten() for weight in self.weights.values()])
        return float((flat - 1.0).square().mean().sqrt())

    @property
    def _first_part(self) -> str:
        return ".ia3_l"

    def _check(self) -> None:
        if not self.layers or len(self.layers) != len(self.weights):
            raise ValueError("the weights are not ia3_l of layers")
        on_input = self.config.get("feedforward_modules")
        if not isinstance(on_input, list) or not all(isinstance(each, str) for each in on_input):
            raise ValueError("feedforward_modules of its settings is no list of names")


_FOREIGN = (
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
    "use_rslora",
)
"""Settings of PEFT's LoRA that change what its weights mean, and that rlprompt does not have."""

METHODS: dict[str, type[LayerAdapter]] = {"LORA": LoRA, "IA3": IA3}
"""By PEFT's `peft_type`."""


def _scale_input(factors: Tensor) -> InputHook:
    return lambda x: (x * factors).to(x.dtype)


def _scale_output(factors: Tensor) -> OutputHook:
    return lambda x, out: (out * factors).to(out.dtype)


def _factor_shape(name: str, shape: LinearShape, on_input: Sequence[str]) -> tuple[int, int]:
    return (1, shape.inputs) if _ends_with(name, on_input) else (shape.outputs, 1)


def _ends_with(name: str, targets: Sequence[str]) -> bool:
    """PEFT's rule: a target is a whole name, or its last parts."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _targeted(shapes: Shapes, targets: Sequence[str]) -> dict[str, LinearShape]:
    for target in targets:
        if not any(_ends_with(name, [target]) for name in shapes):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in shapes}))
            raise InputError(
                f"prompt.method.target_modules names {target}, which the base does not have; its "
                f"linear layers are {known}"
            )
    return {name: shape for name, shape in shapes.items() if _ends_with(name, targets)}
