"""The card of an artifact: README.md in the style of model cards.

Names and texts come from users; they are escaped, so that they neither break the tables nor act as
markup.
"""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rlprompt.artifacts.snippet import loading_example
from rlprompt.user_code import is_path


def card(info: Mapping[str, Any]) -> str:
    """Markdown that says what the prompt is, what it was made on, how it did, and how to load it.

    Args:
        info: the fields of `ArtifactInfo`.
    """
    numbers = dict(info["metrics"])
    verdict = numbers.pop("verdict", None)
    lines = [f"# {cell(info['name'])}: a learned system prompt", ""]
    if verdict:
        lines += [f"**{cell(verdict)}**", ""]
    lines += [_about(info), "", *_purpose(info["recipe"])]
    start = {"started from": cell(started_from(info)), "created": cell(info["created"])}
    lines += _table({"base": cell(info["base"]), **_hashes(info), **start})
    lines += _section("How it was made", _table(_making(info["recipe"])))
    lines += _section("Held-out results", _table({cell(k): cell(v) for k, v in numbers.items()}))
    if info.get("certificate"):
        claim = cell(_mapping(info["certificate"]).get("statement"))
        lines += ["## Certificate", "", claim, "", "Check it: `rlprompt certify . --verify`", ""]
    lines += ["## Limits", "", *_limits(info, verdict), ""]
    if info.get("endpoint"):
        return "\n".join([*lines, *_text_section(info)])
    return "\n".join([*lines, *_use(info)])


def _section(title: str, lines: Sequence[str]) -> list[str]:
    """A section; nothing where there is nothing to say."""
    return [f"## {title}", "", *lines] if lines else []


def _table(rows: Mapping[str, str]) -> list[str]:
    """A table without a header; nothing without rows."""
    if not rows:
        return []
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]


def _purpose(recipe: Mapping[str, Any]) -> list[str]:
    """What answers under the prompt were rewarded for, in a sentence."""
    by_role: dict[str, list[str]] = {}
    for each in map(_mapping, _list(recipe.get("rewards"))):
        name, weight = cell(each.get("name") or each.get("path")), each.get("weight")
        shown = name if weight in (None, 1, 1.0) else f"{name} (weight {cell(weight)})"
        by_role.setdefault(str(each.get("role", "score")), []).append(shown)
    told = [
        f"{words} {', '.join(by_role[role])}"
        for role, words in (
            ("score", "raise"),
            ("gate", "pass the gate"),
            ("constraint", "keep within its limit"),
        )
        if role in by_role
    ]
    return [f"It was learned so that answers {'; '.join(told)}.", ""] if told else []


def _making(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Rows about data, rewards, method and seed, as far as the recipe has them."""
    data, search = _mapping(recipe.get("data")), _mapping(recipe.get("search"))
    method = search.get("type") or _mapping(recipe.get("algorithm")).get("type")
    steps = _mapping(recipe.get("training")).get("steps")
    rows: dict[str, str] = {}
    if method:
        rows["method"] = f"{cell(method)}, {cell(steps)} steps" if steps else cell(method)
    rows_given = _list(data.get("rows"))
    source = data.get("path") or (f"{len(rows_given)} rows" if rows_given else None)
    if source:
        rows["data"] = cell(source)
    for each in map(_mapping, _list(recipe.get("rewards"))):
        what = f"{cell(each.get('role', 'score'))}: {cell(each.get('path'))}"
        rows[f"reward {cell(each.get('name'))}"] = what
    if recipe.get("seed") is not None and rows:
        rows["seed"] = cell(recipe["seed"])
    return rows


def _limits(info: Mapping[str, Any], verdict: Any) -> list[str]:
    """What nobody should take the prompt for."""
    where = "Under this name a server may answer with another model tomorrow: evaluate it again."
    if not info.get("endpoint"):
        where = (
            "It acts on this base and chat template only; elsewhere its tensors mean something "
            "else."
        )
    lines = [
        f"- {where}",
        "- Results are about queries like those it was learned and measured on; on others it may "
        "do worse than no prompt.",
        "- It steers, it does not enforce: users can talk a model out of any system prompt.",
    ]
    if not verdict:
        lines.append("- Nothing has shown it to be better than a hand-written text.")
    if not info.get("certificate"):
        lines.append("- Nothing is certified of it.")
    return lines


def _use(info: Mapping[str, Any]) -> list[str]:
    """How to load it, with rlprompt and without."""
    own = _own_class(info["recipe"])
    lines = ["## Use", "", "```bash", f"rlprompt chat . --compare{own}", "```", ""]
    example = loading_example(info)
    if example is None:
        command = f"rlprompt export . --to FORMAT --output DIR{own}"
        return [*lines, "For other programs:", "", "```bash", command, "```", ""]
    fence = _fence(example)
    return [
        *lines,
        "Without rlprompt, in this folder (of an embedded model, BASE is the folder that `rlprompt "
        "model fetch` prints):",
        "",
        f"{fence}python",
        example.rstrip("\n"),
        fence,
        "",
        "For other programs: `rlprompt export . --to FORMAT --output DIR`.",
        "",
    ]


def _fence(text: str) -> str:
    """A fence that a text cannot close."""
    return "`" * (3 + max(map(len, re.findall(r"`{3,}", text)), default=0))


def _about(info: Mapping[str, Any]) -> str:
    """What the prompt is, in a sentence."""
    if info.get("endpoint"):
        return f"A system message for {cell(info['base'])}, found by rlprompt from outputs alone."
    return (
        f"A {cell(info['representation'])} prompt of {cell(info['num_virtual_tokens'])} positions "
        f"for the system slot of {cell(info['base'])}, learned by rlprompt with the model frozen."
    )


def _hashes(info: Mapping[str, Any]) -> dict[str, str]:
    """Rows about what proves that a base is the same; there is nothing of one that is elsewhere."""
    if info.get("endpoint"):
        return {}
    return {
        "base fingerprint": f"`{_plain(info['base_fingerprint'])}`",
        "chat template hash": f"`{_plain(info['template_hash'])}`",
    }


def _plain(value: Any) -> str:
    """Letters and digits of a hash; a stranger's artifact may have anything there."""
    return re.sub(r"[^0-9A-Za-z]", "", str(value))[:64]


def _text_section(info: Mapping[str, Any]) -> list[str]:
    """The text itself, as what is sent."""
    fence = _fence(info["init_text"])
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
