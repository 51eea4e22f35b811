"""Secrets do not belong into a recipe: it is copied wherever a run leaves traces.

The resolved recipe goes into the run's folder, its checkpoints, the artifact that is published, the
report and the trackers. What a server asks for is therefore named in a recipe and kept in the
environment: `token_env`, or `${VARIABLE}` in a `url`. What looks like the secret itself is refused
before anything is written; a batch script, which has to hold what it runs, is warned about.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from rlprompt.endpoints.addresses import VARIABLE

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+\Z")
_PUBLIC_PARAMETERS = frozenset(
    {"api-version", "api_version", "format", "lang", "language", "model", "revision", "task"}
    | {"v", "version"}
)
_NAME = re.compile(
    r"(\A|[-_])(api[-_]?key|secret|password|passwd|passphrase|credentials?|authorization"
    r"|secret[-_]?key|(access|api|auth|bearer)[-_]?token)\Z",
    re.IGNORECASE,
)
_OPTION = re.compile(rf"(\A|[-_])token\Z|{_NAME.pattern}", re.IGNORECASE)
_VALUE = re.compile(
    r"\b(sk-[\w-]{20,}|hf_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}\b|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.)"
)
"""Keys of OpenAI and its like, Hugging Face, GitHub, Slack and AWS, and JSON Web Tokens."""


def secret_in(tree: Any) -> tuple[str, str] | None:
    """The first value of a recipe that holds what looks like a secret.

    Args:
        tree: plain values.

    Returns:
        The dotted key and a sentence's end that says what is there and what to do, neither with the
        secret; None if there is nothing.
    """
    for place, key, value in _texts(tree, ()):
        reason = _in_address(value) if _is_address(key, value) else None
        if reason is None and _VALUE.search(value):
            reason = "holds what looks like an access key"
        if reason is None and _NAME.search(key) and VARIABLE.sub("", value).strip():
            reason = "has the name of a secret"
        if reason is not None:
            return ".".join(place), (
                f"{reason}, and a recipe is copied into run folders, artifacts and trackers; keep "
                f"it in an environment variable, and name that: token_env, or ${{VARIABLE}} in a "
                f"url, or an option of your own"
            )
    return None


def secret_in_command(line: str) -> str | None:
    """Where in a shell line a secret seems to stand: the name of an option, `it` or `an address`.

    None if there is none; a value that begins with `$` is a variable's, and no secret.
    """
    try:
        words = shlex.split(line)
    except ValueError:
        words = line.split()
    for word, after in zip(words, [*words[1:], ""][: len(words)], strict=True):
        if _ADDRESS.match(word):
            if _in_address(word) or _VALUE.search(word):
                return "an address"
            continue
        name, equals, value = word.partition("=")
        value = value if equals else after if word.startswith("-") else ""
        if _OPTION.search(name) and value and not value.startswith("$"):
            return name
        if _VALUE.search(word) or (_ADDRESS.match(value) and _in_address(value)):
            return name if equals else "it"
    return None


def _texts(tree: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Path, last key that is a name, and value of every text in a tree."""
    if isinstance(tree, str):
        yield place, next((part for part in reversed(place) if not part.isdecimal()), ""), tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _texts(value, (*place, *str(key).split(".")))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _texts(value, (*place, str(number)))


def _is_address(key: str, value: str) -> bool:
    return _ADDRESS.match(value) is not None or key == "url"


def _in_address(address: str) -> str | None:
    """What in an address looks like a secret."""
    try:
        parts = urlsplit(VARIABLE.sub("", address))
        if parts.password or (parts.username and parts.scheme.startswith("http")):
            return "holds a user name or password"
        pairs = parse_qsl(f"{parts.query}&{parts.fragment}", keep_blank_values=True)
    except ValueError:
        return None  # no address; whoever uses it says so
    for name, value in pairs:
        if value and name.lower() not in _PUBLIC_PARAMETERS:
            return f"holds a value of {name!r} behind the path, which may be secret"
    return None
