"""How to use an artifact with transformers alone: the program on its card.

The template is rendered with a mark in the system turn, and what stands before the mark is read
into a cache; then each part of the prompt goes in: embeddings and texts through the model, keys and
values as they are. The rest is `generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_MARK = "@@"
_QUESTION = "How do I sharpen a knife?"
_OPEN = """\
BASE = {base}
tokenizer = AutoTokenizer.from_pretrained(BASE)
model = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto")
"""
_END = "print(tokenizer.decode(answer[0, ids.shape[1]:], skip_special_tokens=True))\n"
_IMPORTS = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"


def loading_example(info: Mapping[str, Any]) -> str | None:
    """A program that answers under the prompt, to be run in the artifact's folder.

    Args:
        info: the fields of `ArtifactInfo`.

    Returns:
        Python; None where transformers alone cannot do it: for a class of the user's own, a model
        behind an endpoint, or a chat template that is not the tokenizer's.
    """
    if info.get("endpoint") or _mapping(_mapping(info.get("recipe")).get("model")).get("template"):
        return None
    kind, text = info["representation"], info["init_text"]
    if kind == "adapter":
        return _with_system_text(info, text, adapter=True)
    if kind == "text":
        return _with_system_text(info, text, adapter=False)
    steps = _steps(info)
    return None if steps is None else _with_cache(info, steps)


def _with_system_text(info: Mapping[str, Any], text: str, *, adapter: bool) -> str:
    """A program for a prompt that is a system message, with or without PEFT's adapter."""
    extra = "from peft import PeftModel\n" if adapter else ""
    on = 'model = PeftModel.from_pretrained(model, "adapter")\n' if adapter else ""
    return (
        f"{extra}{_IMPORTS}\n{_OPEN.format(base=_literal(info['base']))}{on}"
        f"turns = {_turns(info, text)}\n"
        "inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, "
        'return_tensors="pt", return_dict=True)\n'
        'ids = inputs["input_ids"]\n'
        "answer = model.generate(**inputs, do_sample=False, max_new_tokens=200)\n" + _END
    )


def _with_cache(info: Mapping[str, Any], steps: Sequence[str]) -> str:
    """A program that builds the prompt's keys and values part by part."""
    return (
        f"import torch\nfrom safetensors.torch import load_file\n{_IMPORTS}\n"
        f"{_OPEN.format(base=_literal(info['base']))}"
        f"turns = {_turns(info, _MARK)}\n"
        "text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)\n"
        f'head, tail = text.split("{_MARK}")\n'
        "read = lambda text: "
        'tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids\n'
        "cache = model(read(head)).past_key_values\n"
        'tensors = load_file("prompt.safetensors")\n'
        + "".join(f"{step}\n" for step in steps)
        + "ids = torch.cat([torch.zeros(1, cache.get_seq_length(), dtype=torch.long), "
        "read(tail)], 1)  # zeros stand for what is cached\n"
        "answer = model.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), "
        "do_sample=False, max_new_tokens=200)\n" + _END
    )


def _steps(info: Mapping[str, Any]) -> list[str] | None:
    """The lines that put a prompt, or the parts of a sequence, into the cache."""
    kind = info["representation"]
    if kind != "sequence":
        step = _step(kind, "", info["init_text"])
        return None if step is None else [step]
    parts = _mapping(info.get("details")).get("parts")
    lines = [
        _step(str(_mapping(part).get("kind")), f"{place}/", str(_mapping(part).get("init_text")))
        for place, part in enumerate(parts if isinstance(parts, list) else ())
    ]
    known = [line for line in lines if line is not None]
    return known if known and len(known) == len(lines) else None


def _step(kind: str, start: str, text: str) -> str | None:
    """The line that puts one part into the cache."""
    if kind == "soft":
        part = f'tensors["{start}embeddings"].to(model.dtype)[None]'
        return f"model(inputs_embeds={part}, past_key_values=cache)"
    if kind == "text":
        return f"model(read({_literal(text.strip())}), past_key_values=cache)"
    if kind == "prefix":
        return (
            f'for layer, (key, value) in enumerate(tensors["{start}keys_values"].to(model.dtype)): '
            "cache.update(key[None], value[None], layer)"
        )
    return None


def _turns(info: Mapping[str, Any], system: str) -> str:
    """The conversation, as Python: the system text opens the user's turn where it has no own."""
    if info.get("system_role") is False:
        return _literal([{"role": "user", "content": f"{system.strip()}\n\n{_QUESTION}"}])
    return _literal(
        [
            {"role": "system", "content": system.strip()},
            {"role": "user", "content": _QUESTION},
        ]
    )


def _literal(value: Any) -> str:
    """Plain values as Python that no reader of Markdown takes for HTML."""
    return repr(value).replace("<", "\\x3c")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
