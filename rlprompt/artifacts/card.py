"""The card of an artifact: README.md in the style of model cards.

Names and texts come from users; they are escaped, so that they neither break the tables nor act as
markup.
"""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Mapping
from typing import Any

from rlprompt.user_code import is_path


def card(info: Mapping[str, Any]) -> str:
    """Markdown that says what the prompt is, what it was made on, and how it did.

    Args:
        info: the fields of `ArtifactInfo`.
    """
    lines = [
        f"# {cell(info['name'])}: a learned system prompt",
        "",
        _about(info),
        "",
        "| | |",
        "|---|---|",
        f"| base | {cell(info['base'])} |",
        *_hashes(info),
        f"| started from | {cell(started_from(info))} |",
        f"| created | {info['created']} |",
        "",
    ]
    numbers = dict(info["metrics"])
    verdict = numbers.pop("verdict", None)
    if verdict:
        lines[2:2] = [f"**{cell(verdict)}**", ""]
    if numbers:
        lines += ["## Held-out results", "", "| | |", "|---|---|"]
        lines += [f"| {cell(k)} | {cell(v)} |" for k, v in numbers.items()]
        lines.append("")
    if info.get("certificate"):
        claim = cell(info["certificate"]["statement"])
        lines += ["## Certificate", "", claim, "", "Check it: `rlprompt certify . --verify`", ""]
    if info.get("endpoint"):
        return "\n".join([*lines, *_text_section(info)])
    lines += [
        "## Use",
        "",
        "```bash",
        f"rlprompt chat . --compare{_own_class(info['recipe'])}",
        "```",
        "",
        "It acts on this base and chat template only; elsewhere its tensors mean something else.",
        "",
    ]
    return "\n".join(lines)


def _about(info: Mapping[str, Any]) -> str:
    """What the prompt is, in a sentence."""
    if info.get("endpoint"):
        return f"A system message for {cell(info['base'])}, found by rlprompt from outputs alone."
    return (
        f"A {info['representation']} prompt of {info['num_virtual_tokens']} positions for the "
        f"system slot of {cell(info['base'])}, learned by rlprompt with the model frozen."
    )


def _hashes(info: Mapping[str, Any]) -> list[str]:
    """Rows about what proves that a base is the same; there is nothing of one that is elsewhere."""
    if info.get("endpoint"):
        return []
    return [
        f"| base fingerprint | `{info['base_fingerprint']}` |",
        f"| chat template hash | `{info['template_hash']}` |",
    ]


def _text_section(info: Mapping[str, Any]) -> list[str]:
    """The text itself, as what is sent."""
    fence = "`" * (3 + max(map(len, re.findall(r"`{3,}", info["init_text"])), default=0))
    return [
        "## Use",
        "",
        "Send this as the system message (`init_text` in prompt.json has it to the letter):",
        "",
        f"{fence}text",
        info["init_text"],
        fence,
        "",
        "What a server answers under this model's name may change; evaluate it again from time to "
        "time: `rlprompt eval . --recipe RECIPE`.",
        "",
    ]


def started_from(info: Mapping[str, Any]) -> str:
    """What a prompt really started from, in words: the text that was left of it, or the artifact.

    Args:
        info: the fields of `ArtifactInfo`.
    """
    settings = _mapping(info["recipe"].get("prompt"))
    parts = _list(_mapping(info.get("details")).get("parts"))
    asked = _list(settings.get("parts"))
    if len(parts) < 2 or len(parts) != len(asked):
        return _start(info["init_text"], settings)
    started = [
        _start(str(_mapping(part).get("init_text", "")), _mapping(wanted))
        for part, wanted in zip(parts, asked, strict=True)
    ]
    return " | ".join(started)


def _start(text: str, settings: Mapping[str, Any]) -> str:
    """What a prompt, or one part of a sequence, started from.

    Args:
        text: the text that was left of it.
        settings: the prompt's part of the recipe.
    """
    artifact = settings.get("from_artifact")
    if artifact is not None:
        began = f", which had begun with: {text}" if text else ""
        return f"the prompt of {artifact}{began}"
    asked = settings.get("init_text")
    if not isinstance(asked, str) or not asked.strip() or asked.strip() == text.strip():
        return text or "random embeddings"
    change = "cut" if len(text.strip()) < len(asked.strip()) else "repeated"
    length = settings.get("num_virtual_tokens")
    return f"{text} ({change} to {length} token{'' if length == 1 else 's'}, from: {asked})"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _own_class(recipe: Mapping[str, Any]) -> str:
    """The option that names a class of the user's own, as the recipe named it."""
    prompt = recipe.get("prompt")
    kind = " ".join(str(prompt.get("type", "")).split()) if isinstance(prompt, dict) else ""
    return f" --prompt-class {shlex.quote(kind)}" if is_path(kind) else ""


def cell(value: Any) -> str:
    """A value as text that neither breaks a table nor acts as markup."""
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(text, quote=False))
