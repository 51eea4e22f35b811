"""Wrong use of a registry, made to order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlprompt.registry.records import Protection
from rlprompt.registry.store import Registry


def registry(p: Any) -> Registry:
    """A registry with the run's prompt as `brief:1`."""
    made = Registry(p.folder / "registry")
    made.add(p.folder / "run" / "artifact", "brief")
    return made


def asking(p: Any, *arguments: str) -> Sequence[str]:
    """A command on that registry."""
    registry(p)
    return ("registry", *arguments)


def protected(p: Any) -> Sequence[str]:
    """An alias that demands what the prompt has not."""
    registry(p).protect("brief", "prod", Protection(certificate=0.1))
    return ("registry", "promote", "brief", "prod", "1")


def torn(p: Any) -> Sequence[str]:
    """Records that somebody has edited."""
    path: Path = registry(p).folder / "prompts" / "brief" / "versions.jsonl"
    path.write_text("{}\n")
    return ("registry", "list")


def touched(p: Any) -> Sequence[str]:
    """Files that somebody has edited."""
    made = registry(p)
    (made.folder / "objects" / made.version("brief", 1).content / "README.md").write_text("")
    return ("registry", "show", "brief:1")


REGISTRY: list[tuple[str, Callable[[Any], Sequence[str]]]] = [
    ("no registry", lambda p: ("registry", "list")),
    ("a name with a space", lambda p: ("registry", "add", "run", "my prompt")),
    ("no artifact to add", lambda p: ("registry", "add", "model", "brief")),
    ("a version without alias or number", lambda p: asking(p, "show", "brief")),
    ("an alias that is not there", lambda p: asking(p, "show", "brief@prod")),
    ("a version that is not there", lambda p: asking(p, "promote", "brief", "prod", "2")),
    ("shares that do not sum to 1", lambda p: asking(p, "promote", "brief", "prod", "1=0.5")),
    ("nothing to go back to", lambda p: asking(p, "rollback", "brief", "prod")),
    ("a version that is not certified", protected),
    ("records that were edited", torn),
    ("files that were edited", touched),
    ("a place that is none", lambda p: asking(p, "push", "brief:1", "hf://me")),
]
