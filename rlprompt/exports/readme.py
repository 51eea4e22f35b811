"""README.md of an export: what it is, where it equals rlprompt and where not, how to load it."""

from __future__ import annotations

import re

from rlprompt.artifacts.card import cell
from rlprompt.exports.source import Source

ANSWERING = """\
turns = [{{"role": "user", "content": "How do I sharpen a knife?"}}]
inputs = tokenizer.apply_chat_template(
    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs, do_sample=False, max_new_tokens=200)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
"""End of an example: one greedy answer of `model` with `tokenizer`; a template of `page`."""


def page(source: Source, title: str, words: str, example: str) -> str:
    """The text of a README.

    Args:
        source: prompt that is exported.
        title: what the folder is.
        words: paragraphs about it.
        example: Python to be run in the folder; `{base}` stands for what `from_pretrained` takes.
    """
    path, revision = source.base_path()
    given = repr(path) if revision is None else f"{path!r}, revision={revision!r}"
    base = source.policy.base
    return plain_page(
        f"{source.name}: {title}",
        f"Made by `rlprompt export` from a {cell(source.prompt.kind)} prompt (hash "
        f"`{source.prompt_hash[:16]}`) for {cell(base.id)}, fingerprint "
        f"`{base.fingerprint[:16]}`. On another base it means nothing.",
        words,
        example.format(base=given),
    )


def plain_page(title: str, origin: str, words: str, example: str) -> str:
    """The text of a README of what needs no base.

    Args:
        title: what the folder is.
        origin: what it was made from, a sentence.
        words: paragraphs about it.
        example: Python to be run in the folder.
    """
    fence = "`" * (3 + max(map(len, re.findall(r"`{3,}", example)), default=0))
    intro = "In this folder:"
    parts = [f"# {cell(title)}", "", origin, "", words, "", intro, ""]
    return "\n".join([*parts, f"{fence}python", example.rstrip("\n"), fence, ""])
