"""The formats that a prompt can be exported to, and which kinds of prompt each can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlprompt.artifacts.card import cell
from rlprompt.errors import InputError
from rlprompt.exports.checkpoint import write_merged, write_vocabulary
from rlprompt.exports.peft import write_peft
from rlprompt.exports.readme import plain_page
from rlprompt.exports.source import Source
from rlprompt.exports.tensors import write_cache, write_embeds
from rlprompt.files import claim_empty_folder
from rlprompt.prompts.adapter import AdapterPrompt
from rlprompt.prompts.text import NonePrompt, TextPrompt

TEXT = "text"
"""The format that needs no base."""
_CONTROL = "gguf-control"
_TEXT_FILE = "system.txt"
_TEXT_EXAMPLE = """\
from pathlib import Path

messages = [
    {"role": "system", "content": Path("system.txt").read_text(encoding="utf-8")},
    {"role": "user", "content": "How do I sharpen a knife?"},
]
print(messages)
"""


@dataclass(frozen=True)
class Format:
    """One way to write a prompt."""

    write: Callable[[Source, Path], None]
    """Writes it into a folder, which is there and empty."""
    holds: Callable[[Source], bool]
    """Whether it can hold the prompt."""


def _any_but_none(source: Source) -> bool:
    return not isinstance(source.prompt, NonePrompt)


def _embedded(source: Source) -> bool:
    return source.is_embedded and _any_but_none(source)


def _adapter(source: Source) -> bool:
    return isinstance(source.prompt, AdapterPrompt)


def _plain_cache(source: Source) -> bool:
    return _any_but_none(source) and source.prefix().adapter is None


def _peft(source: Source) -> bool:
    return _adapter(source) or _plain_cache(source)


def _text(source: Source) -> bool:
    return isinstance(source.prompt, TextPrompt)


def _write_text(source: Source, folder: Path) -> None:
    _write_text_files(source.prompt.init_text, source.policy.base.id, source.name, folder)


FORMATS: Mapping[str, Format] = {
    "peft": Format(write_peft, _peft),
    "merged": Format(write_merged, _adapter),
    "vocabulary": Format(write_vocabulary, _embedded),
    "vllm-embeds": Format(write_embeds, _embedded),
    "kv": Format(write_cache, _plain_cache),
    TEXT: Format(_write_text, _text),
}
"""By the name that `--to` takes."""


def export_prompt(source: Source, to: str, output: Path) -> Path:
    """Write a prompt for another program; nothing is left where that fails.

    Args:
        source: prompt to write.
        to: name of the format, a key of `FORMATS`.
        output: folder that is to be made; it may be there if it is empty.

    Returns:
        The folder.

    Raises:
        InputError: there is no such format, it cannot hold the prompt, or the folder cannot be
            made.
    """
    check_format(to)
    if not FORMATS[to].holds(source):
        has = [name for name, each in FORMATS.items() if each.holds(source)]
        raise InputError(
            f"a {source.prompt.kind} prompt has no form in the format {to}; "
            + (f"use --to {' or '.join(has)}" if has else "no format holds it")
        )
    with claim_empty_folder(output) as folder:
        FORMATS[to].write(source, folder)
    return output


def check_format(to: str) -> None:
    """Refuse a name that is no format.

    Args:
        to: name that a user gives.

    Raises:
        InputError: it is none.
    """
    if to == _CONTROL:
        raise InputError(
            "a learned prompt is no GGUF control vector, which adds one fixed vector per layer at "
            "every token, while a prompt is attended to; llama.cpp takes it as a checkpoint: use "
            "--to vocabulary and convert that"
        )
    if to not in FORMATS:
        raise InputError(f"there is no format '{to[:80]}'; use --to {' or '.join(FORMATS)}")


def export_text(text: str, base: str, name: str, output: Path) -> Path:
    """Write a text prompt as text, for which no base is loaded.

    Args:
        text: the system message.
        base: id of the model that it is for.
        name: what the prompt is called.
        output: folder that is to be made; it may be there if it is empty.

    Returns:
        The folder.

    Raises:
        InputError: the folder cannot be made.
    """
    with claim_empty_folder(output) as folder:
        _write_text_files(text, base, name, folder)
    return output


def _write_text_files(text: str, base: str, name: str, folder: Path) -> None:
    (folder / _TEXT_FILE).write_text(text.strip(), encoding="utf-8", newline="")
    told = plain_page(
        f"{name}: a system message",
        f"Made by `rlprompt export` from a text prompt for {cell(base)}.",
        f"`{_TEXT_FILE}` is the system message, to the letter: there is no line break at its end. "
        "Any server or program that takes messages takes it.",
        _TEXT_EXAMPLE,
    )
    (folder / "README.md").write_text(told, encoding="utf-8")
