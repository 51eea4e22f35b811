"""From the values and tensor names of a GGUF file to a configuration and names of transformers.

What llama.cpp does with a file is written down in its code, not in the file: that Llama's query and
key rows are interleaved, that Gemma's norms are stored with one added, which layers have a window.
Here that is undone, per family. A value that would change what the model computes and that this
module does not know how to keep is an error.

Source: llama.cpp's converter and its loading of these families.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlprompt.reading.gguf_file import GgufError, GgufFile

_MOST = 1 << 24
_LLAMA3_ORIGINAL = 8192
_GEMMA3_27B_LAYERS = 62

_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TWO_NORMS = {"ffn_norm.weight": "post_attention_layernorm.weight"}
_BIASES = {
    name.replace("weight", "bias"): own.replace("weight", "bias")
    for name, own in _LAYER.items()
    if "norm" not in name
}
_FOUR_NORMS = {
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LEFT_OUT = frozenset({"rope_freqs.weight"})
"""Tensors that become settings."""

_NEUTRAL: Mapping[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.scale": 0.0,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attn_logit_softcapping": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "use_parallel_residual": False,
    "tensor_data_layout": "Meta AI original pth",
    "pooling_type": 0,
}
"""Values that change what a model computes, and what each says where it changes nothing."""


@dataclass(frozen=True)
class Conversion:
    """How the tensors of a file become a model of transformers."""

    config: dict[str, Any]
    """What config.json says; `model_type` says of which class."""
    names: Mapping[str, str]
    """Tensor of the file -> parameter."""
    restore: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """Tensor of the file -> what undoes the change that llama.cpp's converter has made."""


class _Values:
    """The values of one architecture, checked as they are read."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._values = file.values
        self._prefix = architecture

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(f"{self._prefix}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 on; one that is given per layer must be the same for all."""
        value = self.get(key, default)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
            said = "is missing" if value is None else f"is {str(value)[:60]}"
            raise GgufError(
                f"{self._prefix}.{key} {said}, where a whole number from 1 to {_MOST} is wanted"
            )
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number, as the shortest decimal that a float32 has it from."""
        value = self.get(key, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not math.isfinite(value) or value <= 0:
            said = "is missing" if value is None else f"is {str(value)[:60]}"
            raise GgufError(f"{self._prefix}.{key} {said}, where a positive number is wanted")
        return decimal(float(value))

    def require_neutral(self) -> None:
        """Refuse what would make the model compute something that is not kept."""
        for key, neutral in _NEUTRAL.items():
            value = self.get(key, neutral)
            if value != neutral:
                raise GgufError(
                    f"{self._prefix}.{key} is {str(value)[:40]}, which is a model of a kind that "
                    "rlprompt does not convert"
                )


def decimal(value: float) -> float:
    """The shortest decimal number that rounds to the same float32."""
    wanted = float(torch.tensor(value, dtype=torch.float32))
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if float(torch.tensor(short, dtype=torch.float32)) == wanted:
            return short
    return value


def conversion(file: GgufFile) -> Conversion:
    """How a file becomes a model of transformers.

    Args:
        file: file of one of `FAMILIES`.

    Raises:
        GgufError: it is of another architecture, lacks a value, or has one that cannot be kept.
    """
    architecture = file.values.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise GgufError(
            f"it holds a model of the architecture {str(architecture)[:40]!r}, and those of "
            f"{', '.join(FAMILIES)} can be converted"
        )
    if file.values.get("split.count", 1) not in (0, 1):
        raise GgufError("it is one part of several: merge them with llama.cpp's llama-gguf-split")
    values = _Values(file, architecture)
    values.require_neutral()
    return FAMILIES[architecture](file, values)


def _common(file: GgufFile, values: _Values) -> dict[str, Any]:
    """Sizes that all families state."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise GgufError("it lacks the tensor token_embd.weight")
    layers = values.count("block_count")
    present = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if len(present) != layers:
        raise GgufError(f"block_count is {layers}, but it holds tensors of {len(present)} layers")
    heads = values.count("attention.head_count")
    width = values.count("embedding_length")
    head_dim = values.count("attention.key_length", max(width // heads, 1))
    if values.count("attention.value_length", head_dim) != head_dim:
        raise GgufError("its keys and values are of different sizes, which rlprompt does not have")
    if values.count("rope.dimension_count", head_dim) != head_dim:
        raise GgufError("it turns a part of each head only, which rlprompt does not convert")
    kv_heads = values.count("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise GgufError(f"its {heads} query heads cannot share {kv_heads} heads of keys")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": values.count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": values.count("context_length"),
        "rms_norm_eps": values.real("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _names(file: GgufFile, config: Mapping[str, Any], layer: Mapping[str, str]) -> dict[str, str]:
    """Tensor -> parameter, for all that the file has."""
    known = dict(_OUTER)
    for number in range(int(config["num_hidden_layers"])):
        for name, own in layer.items():
            known[f"blk.{number}.{name}"] = f"model.layers.{number}.{own}"
    strange = sorted(file.tensors.keys() - known.keys() - _LEFT_OUT)
    if strange:
        raise GgufError(
            f"it holds {len(strange)} tensor(s) that its family does not have, such as "
            f"{strange[0]!r}"
        )
    return {name: known[name] for name in file.tensors if name in known}


def _llama(file: GgufFile, values: _Values) -> Conversion:
    config = _common(file, values)
    _refuse_window(values)
    config |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "rope_parameters": _rope(file, values, 10_000.0),
    }
    names = _names(file, config, _LAYER | _TWO_NORMS | _BIASES)
    restore = {}
    for name in names:
        for part, heads in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
            if f".{part}." in name:
                restore[name] = _halves(int(config[heads]))
    return Conversion(config, names, restore)


def _halves(heads: int) -> Callable[[Tensor], Tensor]:
    """Rows of each head from pairs (llama.cpp turns neighbours) to halves (transformers)."""

    def restore(stored: Tensor) -> Tensor:
        pairs = stored.reshape(heads, stored.shape[0] // heads // 2, 2, *stored.shape[1:])
        return pairs.transpose(1, 2).reshape(stored.shape)

    return restore


def _qwen2(file: GgufFile, values: _Values) -> Conversion:
    config = _common(file, values)
    _refuse_window(values)
    config |= {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": None,
        "rope_parameters": _rope(file, values, 10_000.0),
    }
    biases = {name: own for name, own in _BIASES.items() if name.startswith("attn_")}
    del biases["attn_output.bias"]
    return Conversion(config, _names(file, config, _LAYER | _TWO_NORMS | biases))


def _gemma3(file: GgufFile, values: _Values) -> Conversion:
    config = _common(file, values)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    full = _rope(file, values, 1_000_000.0)
    local = {"rope_type": "default", "rope_theta": values.real("rope.freq_base_swa", 10_000.0)}
    # llama.cpp knows the 27B model, whose queries are scaled by another width, by its depth.
    large = layers == _GEMMA3_27B_LAYERS
    softcap = values.get("final_logit_softcapping") or None
    config |= {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "sliding_window": values.count("attention.sliding_window"),
        "layer_types": _layer_types(values, layers),
        "query_pre_attn_scalar": config["hidden_size"] // heads if large else config["head_dim"],
        "final_logit_softcapping": softcap,
        "attn_logit_softcapping": None,
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
    }
    names = _names(file, config, _LAYER | _FOUR_NORMS)
    return Conversion(
        config, names, {name: _less_one for name in names if name.endswith("norm.weight")}
    )


def _less_one(stored: Tensor) -> Tensor:
    return stored - 1.0


def _layer_types(values: _Values, layers: int) -> list[str]:
    """Every sixth layer attends to all positions, unless the file says otherwise."""
    pattern = values.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        if len(pattern) != layers:
            raise GgufError(f"its pattern of windows is for {len(pattern)} of {layers} layers")
        windows = [bool(each) for each in pattern]
    elif isinstance(pattern, int) and pattern > 0:
        windows = [(number + 1) % pattern != 0 for number in range(layers)]
    else:
        raise GgufError(f"its pattern of windows is {str(pattern)[:40]}")
    return ["sliding_attention" if window else "full_attention" for window in windows]


def _refuse_window(values: _Values) -> None:
    window = values.get("attention.sliding_window")
    if window and window < values.count("context_length"):
        raise GgufError(
            f"its layers have a window of {str(window)[:20]} tokens, which rlprompt does not "
            "convert for this architecture"
        )


def _rope(file: GgufFile, values: _Values, theta: float) -> dict[str, Any]:
    """How positions turn queries and keys."""
    rope: dict[str, Any] = {"rope_theta": values.real("rope.freq_base", theta)}
    kind = values.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        if kind != "none":
            raise GgufError(f"it has factors of frequencies beside the scaling {str(kind)[:20]!r}")
        return rope | _llama3(file, rope["rope_theta"], values)
    if kind == "none" and values.get("rope.scale_linear", 1.0) != 1.0:
        return rope | {"rope_type": "linear", "factor": values.real("rope.scale_linear")}
    if kind == "none":
        return rope | {"rope_type": "default"}
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": values.real("rope.scaling.factor")}
    if kind != "yarn":
        raise GgufError(f"its positions are scaled by {str(kind)[:20]!r}, which is not converted")
    return rope | _yarn(values)


def _yarn(values: _Values) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": values.real("rope.scaling.factor"),
        "original_max_position_embeddings": values.count("rope.scaling.original_context_length"),
    }
    for key, own in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if values.get(f"rope.scaling.{key}") is not None:
            rope[own] = values.real(f"rope.scaling.{key}")
    for key in ("attn_factor", "yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor"):
        if values.get(f"rope.scaling.{key}") not in (None, 1.0):
            raise GgufError(f"its rope.scaling.{key} is one that is not converted")
    return rope


def _llama3(file: GgufFile, theta: float, values: _Values) -> dict[str, Any]:
    """The scaling of Llama 3.1 and later, from the factors that were made of it.

    The largest factor is that of the longest waves; the other settings have been the same in all
    models, so that they are tried and must give the factors in the file.
    """
    tensor = file.tensors["rope_freqs.weight"]
    if tensor.kind != "F32" or len(tensor.shape) != 1 or tensor.num_bytes > 1 << 16:
        raise GgufError("its factors of frequencies are no list of float32")
    stored = b"".join(file.rows(tensor, 1 << 16))
    factors = torch.frombuffer(bytearray(stored), dtype=torch.float32).double()
    factor = float(factors.max())
    rope = {
        "rope_type": "llama3",
        "factor": decimal(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL,
    }
    width = values.count(
        "attention.key_length",
        values.count("embedding_length") // values.count("attention.head_count"),
    )
    wanted = llama3_factors(theta, width, factor)
    fits = len(wanted) == len(factors) and math.isfinite(factor)
    if not fits or not torch.allclose(factors, wanted, rtol=1e-4):
        raise GgufError("its factors of frequencies are not those of Llama 3, and not converted")
    return rope


def llama3_factors(theta: float, head_dim: int, factor: float) -> Tensor:
    """What Llama 3 divides each frequency by, float64 [D / 2].

    Args:
        theta: base of the frequencies.
        head_dim: size D of a head.
        factor: divisor of the longest waves.
    """
    places = torch.arange(0, head_dim, 2, dtype=torch.float64)
    waves = 2 * math.pi * theta ** (places / head_dim)
    smooth = ((_LLAMA3_ORIGINAL / waves - 1.0) / 3.0).clamp(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


FAMILIES: Mapping[str, Callable[[GgufFile, _Values], Conversion]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "gemma3": _gemma3,
}
"""Architectures, in GGUF's words, that can be converted."""
