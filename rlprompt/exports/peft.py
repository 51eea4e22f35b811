"""Folders that `PeftModel.from_pretrained` loads: prompt tuning, prefix tuning, LoRA and IA3.

PEFT puts virtual tokens before everything, ours stand inside the system turn. So the virtual tokens
of an exported folder are the template's head and the prompt together, and its tokenizer's template
writes only what comes after; then PEFT's logits are ours. Keys are written with the rotary
embedding of their positions, from 0 on, which is where PEFT puts them.

Letters: m virtual tokens, d model width, P prefix tokens, L layers, H_kv key/value heads, D head
dim.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlprompt.exports.readme import ANSWERING, page
from rlprompt.exports.source import Source, require_one_shape
from rlprompt.exports.template import check_template, only_tail, with_text
from rlprompt.files import to_json
from rlprompt.prompts.adapter import AdapterPrompt
from rlprompt.types import PrefixKV

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_VIRTUAL = "prompt_embeddings"
"""PEFT's name for the only tensor of prompt and prefix tuning."""

_EXAMPLE = (
    """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")
model = PeftModel.from_pretrained(base, ".")
tokenizer = AutoTokenizer.from_pretrained(".")
"""
    + ANSWERING
)

_VIRTUAL_WORDS = """\
The virtual tokens are what the chat template writes before the system text, and the learned prompt
behind it ({head} + {slot} positions). The tokenizer in this folder has a chat template that writes
only what comes after them. Together they give the logits of rlprompt, up to the order of sums.

They do not with the base's own tokenizer or template: the virtual tokens would then stand before a
second beginning of the text, where nothing was learned. A system message in the conversation is
refused, as its place is taken."""

_ADAPTER_WORDS = """\
The adapter was learned under a system text and is to be used with it. The chat template of the
tokenizer in this folder writes that text by itself; a system message in the conversation is
refused. Together they give the logits of rlprompt: in float32 up to the order of sums, in bfloat16
up to its rounding, which PEFT does at other places."""


def write_peft(source: Source, folder: Path) -> None:
    """Write the folder that PEFT has for the kind of prompt.

    Args:
        source: prompt to write.
        folder: folder, which is there and empty.

    Raises:
        InputError: the tokenizer or the layers of the base have no form in PEFT.
    """
    if isinstance(source.prompt, AdapterPrompt):
        _write_adapter(source, source.prompt, folder)
        return
    if source.is_embedded:
        virtual = torch.cat([source.head_embeddings(), source.embeddings()]).cpu()
        config = _prompt_tuning(source, len(virtual))
    else:
        prefix = source.prefix()
        virtual = prefix_rows(prefix)
        config = _prefix_tuning(source, prefix)
    _write_config(source, config, folder)
    save_file({_VIRTUAL: virtual.contiguous()}, folder / _WEIGHTS, {"format": "pt"})
    _write_tokenizer(source, only_tail(source.policy.slot), [], folder)
    head = len(source.policy.head_ids)
    words = _VIRTUAL_WORDS.format(head=head, slot=len(virtual) - head)
    _write_page(source, config["peft_type"], words, folder)


def prefix_rows(prefix: PrefixKV) -> Tensor:
    """Keys and values as PEFT's prefix encoder holds them.

    Args:
        prefix: [H_kv, P, D] by layer.

    Returns:
        [P, L * 2 * H_kv * D].

    Raises:
        InputError: layers have keys of different shapes.
    """
    require_one_shape(prefix)
    pairs = zip(prefix.keys, prefix.values, strict=True)
    layers = torch.stack([torch.stack([key, value]) for key, value in pairs])  # [L, 2, H_kv, P, D]
    return layers.permute(3, 0, 1, 2, 4).flatten(1).detach().cpu()


def _prompt_tuning(source: Source, count: int) -> dict[str, Any]:
    width = source.policy.hidden_size
    own = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
    return {**own, **_virtual_tokens(source, count, width)}


def _prefix_tuning(source: Source, prefix: PrefixKV) -> dict[str, Any]:
    heads, _, dim = prefix.keys[0].shape
    own = {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "encoder_hidden_size": None}
    common = _virtual_tokens(source, prefix.num_tokens, heads * dim)
    return {**own, **common, "num_attention_heads": heads}


def _virtual_tokens(source: Source, count: int, width: int) -> dict[str, Any]:
    base = source.policy.base
    return {
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": count,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": base.num_kv_heads,
        "num_layers": base.num_layers,
    }


def _write_adapter(source: Source, prompt: AdapterPrompt, folder: Path) -> None:
    files = prompt.artifact_files(source.base_path()[0])
    (folder / _WEIGHTS).write_bytes(files[f"adapter/{_WEIGHTS}"])
    _write_config(source, json.loads(files[f"adapter/{_CONFIG}"]), folder)
    slot = source.policy.slot
    before = [*slot.head_ids, *slot.slot_ids(prompt.init_text)]
    _write_tokenizer(source, with_text(slot, prompt.init_text), before, folder)
    _write_page(source, prompt.adapter.peft_type, _ADAPTER_WORDS, folder)


def _write_config(source: Source, config: dict[str, Any], folder: Path) -> None:
    path, revision = source.base_path()
    told = {**config, "base_model_name_or_path": path, "revision": revision}
    (folder / _CONFIG).write_text(to_json(told, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(source: Source, template: str, before: list[int], folder: Path) -> None:
    tokenizer = source.tokenizer(template)
    check_template(source.policy.slot, tokenizer, before, "peft")
    tokenizer.save_pretrained(folder)


def _write_page(source: Source, peft_type: str, words: str, folder: Path) -> None:
    title = f"{peft_type.replace('_', ' ').lower()} for PEFT"
    (folder / "README.md").write_text(page(source, title, words, _EXAMPLE), encoding="utf-8")
