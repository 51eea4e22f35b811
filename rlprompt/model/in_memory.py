"""A base from a model that is in memory already; the caller's model stays as it was.

rlprompt switches a base's attention, packs its linear layers and puts kernels in the place of known
modules. That happens to a copy of the module tree whose parameters share the memory of the
caller's: nothing is loaded twice, and the caller's model keeps its modules, hooks, mode and
gradients.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlprompt.errors import InputError
from rlprompt.model.base import FrozenBase, freeze


def base_in_memory(model: Any, tokenizer: Any) -> FrozenBase:
    """A frozen base over the weights of a loaded model.

    Args:
        model: a decoder-only `transformers` model, on one device; it is not changed, and must not
            be trained while the base is used.
        tokenizer: its tokenizer, with a chat template.

    Raises:
        InputError: model or tokenizer is of another kind, the model is spread over devices, or they
            do not belong together (see `freeze`).
    """
    if not isinstance(model, PreTrainedModel):
        hint = "merge the adapter first (merge_and_unload), then give the model"
        advice = hint if hasattr(model, "merge_and_unload") else "give a transformers model"
        raise InputError(f"model is of type {type(model).__name__}, no PreTrainedModel; {advice}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        given = "missing" if tokenizer is None else f"of type {type(tokenizer).__name__}"
        raise InputError(
            f"tokenizer is {given}; give the model's own, such as "
            "AutoTokenizer.from_pretrained(...)"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            "model has an adapter loaded, which would change the frozen base; give the model "
            "without it, or merge the adapter into the weights first"
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1:
        raise InputError(
            f"the weights of model lie on {len(devices)} devices ({', '.join(sorted(devices))}); "
            "move the whole model to one"
        )
    return freeze(_with_own_modules(model), tokenizer, model_name(model))


def model_name(model: PreTrainedModel) -> str:
    """What a model in memory is called: the path or hub id that it came from, or its class."""
    return str(model.config._name_or_path or type(model).__name__)


def _with_own_modules(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the module tree over the same memory; ties between weights stay."""
    shared: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, shared)
