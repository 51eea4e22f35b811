"""The shape of any base that transformers knows, counted on a model without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from rlprompt.errors import InputError
from rlprompt.model.files.converted import is_converted
from rlprompt.model.files.fetch import EMBEDDED
from rlprompt.model.files.folder import locate
from rlprompt.model.load import read_config
from rlprompt.planning.tables import Linears, Shape

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names of the number of experts in configs."""


@dataclass(frozen=True)
class CountedShape(Shape):
    """A base of any architecture, whose parameters were counted."""

    total: int = 0
    """All parameters; a tied matrix once."""
    ends: int = 0
    """Embedding and LM head."""
    active: int = 0
    """Parameters that one token meets."""
    counted: Mapping[str, Linears] = field(default_factory=dict)
    """Linear layers."""

    @property
    def layer_parameters(self) -> int:
        """Of a layer on average."""
        return (self.total - self.ends - self.width) // self.layers

    @property
    def end_parameters(self) -> int:
        """Embedding and LM head, one matrix when they are tied."""
        return self.ends

    @property
    def parameters(self) -> int:
        """P."""
        return self.total

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets."""
        return self.active

    @property
    def linears(self) -> Mapping[str, Linears]:
        """The linear layers but for the LM head, by the last part of their names."""
        return self.counted


def shape_of_model(name: str) -> Shape:
    """The shape of a model, of which only the config is read.

    Args:
        name: folder with a config.json, the file itself, a name of the cache, or a hub id, of which
            the config is fetched.

    Raises:
        InputError: there is no such config, or it is not that of a decoder-only model.
    """
    path = Path(name).expanduser()
    if name in EMBEDDED or is_converted(name):
        folder = locate(name, None).folder
    elif path.is_file():
        folder = path.parent
    elif path.is_dir():
        folder = path
    else:
        try:
            folder = Path(hf_hub_download(name, "config.json")).parent
        except Exception as error:  # of names, of the network, of access
            raise InputError(
                f"--model is '{name}', which is no folder with a config.json, no name of "
                f"`rlprompt model list`, and no model of the hub that can be reached "
                f"({type(error).__name__}); give one of them"
            ) from error
    return shape_of_config(read_config(folder, False))


def shape_of_config(config: PretrainedConfig) -> Shape:
    """The shape of a base.

    Args:
        config: config of a decoder-only model.

    Raises:
        InputError: transformers cannot make a model of it.
    """
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise InputError(
            f"no model can be made of the config of type {config.model_type} "
            f"({type(error).__name__}: {error}); correct it"
        ) from error
    text: Any = config.get_text_config(decoder=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight or bool(text.tie_word_embeddings)
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    if tied and head is not None and head.weight is not embedding.weight:
        total -= head.weight.numel()
    vocab, width = embedding.weight.shape
    counted, experts = _linears(model, head)
    share = _chosen_share(text)
    heads = int(text.num_attention_heads)
    return CountedShape(
        layers=int(text.num_hidden_layers),
        width=int(width),
        mlp=_mlp(text, int(width)),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        vocab=int(vocab),
        tied=tied,
        total=total,
        ends=int(vocab * width) * (1 if tied else 2),
        active=total - int(experts * (1 - share)),
        counted=counted,
    )


def _linears(model: nn.Module, head: nn.Module | None) -> tuple[dict[str, Linears], int]:
    """Linear layers by the last part of their names, and the parameters of experts."""
    counted: dict[str, Linears] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            name = path.rpartition(".")[2]
            before = counted.get(name)
            outputs, inputs = module.weight.shape
            counted[name] = Linears(inputs, outputs, 1 + (before.number if before else 0))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return counted, experts


def _chosen_share(text: Any) -> float:
    """Share of the experts that a token meets."""
    number = next((int(getattr(text, n)) for n in _EXPERTS if getattr(text, n, None)), 0)
    chosen = int(getattr(text, "num_experts_per_tok", None) or number)
    return chosen / number if number else 1.0


def _mlp(text: Any, width: int) -> int:
    """Units that one token's MLP computes."""
    if any(getattr(text, name, None) for name in _EXPERTS):
        own = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
        return int(own) * int(getattr(text, "num_experts_per_tok", None) or 1)
    return int(getattr(text, "intermediate_size", None) or 4 * width)
