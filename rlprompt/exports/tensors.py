"""Raw tensors for programs that take them: prompt embeddings for vLLM, and keys and values.

Letters: m virtual tokens, d model width, P prefix tokens, H_kv key/value heads, D head dim.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from rlprompt.exports.readme import page
from rlprompt.exports.source import Source
from rlprompt.exports.template import check_template, only_tail

_EMBEDS = "prompt_embeds.safetensors"
_CACHE = "keys_values.safetensors"

_VLLM_WORDS = """\
`prompt_embeds.safetensors` has one tensor, `prompt_embeds` [{count}, {width}]: input embeddings
that stand where the system text would. vLLM 0.21 or newer takes them as a part of a message; its
server renders the chat template around them:

```bash
vllm serve BASE --enable-prompt-embeds --host 127.0.0.1
```

Whoever may send embeddings may send any: keep that server behind one of your own, which removes
what clients send as `prompt_embeds` and puts this file in. Cached prefixes are told apart by the
rows' content, so a new file needs no restart.

The answer is that of rlprompt where the server's template and tokenizer are the base's, text of
users spells no control token, and the template prints no date."""
_VLLM_EXAMPLE = """\
import base64
import io
import json

import torch
from safetensors.torch import load_file

rows = load_file("prompt_embeds.safetensors")["prompt_embeds"]
stored = io.BytesIO()
torch.save(rows, stored)
prompt = {{"type": "prompt_embeds", "data": base64.b64encode(stored.getvalue()).decode()}}
body = {{
    "model": {model},
    "messages": {messages},
}}
print(len(json.dumps(body)), "bytes for POST http://127.0.0.1:8000/v1/chat/completions")
"""
_QUESTION = '"How do I sharpen a knife?"'
_WITH_SYSTEM = (
    '[\n        {{"role": "system", "content": [prompt]}},\n        {{"role": "user", "content": '
    + _QUESTION
    + "}},\n    ]"
)
_FOLDED = (
    '[\n        {{"role": "user", "content": [prompt, {{"type": "text", "text": "\\\\n\\\\n" + '
    + _QUESTION
    + "}}]}},\n    ]"
)

_CACHE_WORDS = """\
`keys_values.safetensors` has the keys and values of every layer, `keys.N` and `values.N`
[{heads}, {count}, {dim}], for the positions 0 to {last}: what the chat template writes before the
system text, and the prompt. Keys have the rotary embedding of these positions. A program that puts
them at the beginning of its cache, and goes on with the tokens that come after, computes what
rlprompt computes. The chat template of the tokenizer in this folder writes only these tokens."""
_CACHE_EXAMPLE = """\
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

model = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(".")
tensors = load_file("keys_values.safetensors")
cache = DynamicCache(config=model.config)
for layer in range(len(tensors) // 2):
    pair = [tensors[f"{{part}}.{{layer}}"].to(model.dtype)[None] for part in ("keys", "values")]
    cache.update(*pair, layer)
turns = [{{"role": "user", "content": "How do I sharpen a knife?"}}]
inputs = tokenizer.apply_chat_template(
    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
cached = torch.zeros(1, cache.get_seq_length(), dtype=torch.long)  # stand for what is cached
ids = torch.cat([cached, inputs["input_ids"]], 1)
answer = model.generate(
    ids, past_key_values=cache, attention_mask=torch.ones_like(ids), do_sample=False,
    max_new_tokens=200,
)
print(tokenizer.decode(answer[0, ids.shape[1]:], skip_special_tokens=True))
"""


def write_embeds(source: Source, folder: Path) -> None:
    """Write the slot's embeddings for vLLM.

    Args:
        source: prompt that is input embeddings.
        folder: folder, which is there and empty.
    """
    rows = source.embeddings().cpu()
    save_file({"prompt_embeds": rows}, folder / _EMBEDS, {"format": "pt"})
    words = _VLLM_WORDS.format(count=rows.shape[0], width=rows.shape[1])
    messages = _FOLDED if source.policy.slot.folds_system else _WITH_SYSTEM
    example = _VLLM_EXAMPLE.replace("{model}", "{base}").replace("{messages}", messages)
    text = page(source, "prompt embeddings for vLLM", words, example)
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_cache(source: Source, folder: Path) -> None:
    """Write keys and values of head and slot.

    Args:
        source: prompt whose prefix is all that it is.
        folder: folder, which is there and empty.

    Raises:
        InputError: the tokenizer reads the rest of the template in another way.
    """
    prefix, slot = source.prefix(), source.policy.slot
    layers = enumerate(zip(prefix.keys, prefix.values, strict=True))
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for layer, pair in layers
        for name, tensor in zip((f"keys.{layer}", f"values.{layer}"), pair, strict=True)
    }
    save_file(tensors, folder / _CACHE, {"format": "pt"})
    tokenizer = source.tokenizer(only_tail(slot))
    check_template(slot, tokenizer, [], "kv")
    tokenizer.save_pretrained(folder)
    heads, count, dim = prefix.keys[0].shape
    words = _CACHE_WORDS.format(heads=heads, count=count, dim=dim, last=count - 1)
    text = page(source, "keys and values", words, _CACHE_EXAMPLE)
    (folder / "README.md").write_text(text, encoding="utf-8")
