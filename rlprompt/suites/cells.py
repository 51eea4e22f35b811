"""Results that are kept by what they are made of, so that a run goes on where it was cut off.

The name of a cell is a hash of everything that its content depends on: the prompt, the base, the
situation or measure, the queries, the rewards with their source, sampling, seed, and the source of
the package. What a reward asks elsewhere (a server, a judge) is not in it: after such a change,
name another folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rlprompt.files import to_json, write_atomic
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt
from rlprompt.reading import json_text
from rlprompt.reading.files import read_bytes
from rlprompt.rewards.base import RewardSettings

_PACKAGE = Path(__file__).parents[1]
_MOST_BYTES = 256 * 2**20


class Cells:
    """The cells of an output folder."""

    def __init__(self, folder: Path) -> None:
        """Keep the folder, which is made when the first cell is written.

        Args:
            folder: folder of the cells.
        """
        self._folder = folder
        self.num_made = 0
        """Cells that were computed."""
        self.num_kept = 0
        """Cells that were there."""

    def get(self, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The content of a cell: the one that is there, or a new one.

        Args:
            key: all that it depends on, as JSON values.
            make: function that computes it, as JSON values.
        """
        plain: dict[str, Any] = json_text.loads(to_json(dict(key)))
        path = self._folder / f"{digest(plain)[:32]}.json"
        kept = _read(path, plain)
        if kept is not None:
            self.num_kept += 1
            return kept
        made: dict[str, Any] = json_text.loads(to_json(make()))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, to_json({"key": plain, "content": made}))
        self.num_made += 1
        return made


def digest(value: Any) -> str:
    """Sha256 of a JSON value, 64 hex digits."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()


def identity(prompt: Prompt, base: str) -> str:
    """What names the content of a prompt.

    Args:
        prompt: the prompt.
        base: id of the base that it belongs to.
    """
    if isinstance(prompt, NonePrompt):
        return "none"
    total = hashlib.sha256(to_json([prompt.kind, prompt.init_text]).encode())
    total.update(to_json(prompt.artifact_details()).encode())
    for name, content in sorted(prompt.artifact_files(base).items()):
        total.update(to_json([name, hashlib.sha256(content).hexdigest()]).encode())
    return total.hexdigest()


@cache
def code_version() -> str:
    """Sha256 over the source and data of this package."""
    total = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        if path.suffix in (".py", ".cpp", ".jsonl", ".yaml") and path.is_file():
            total.update(str(path.relative_to(_PACKAGE)).encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def reward_sources(rewards: Sequence[RewardSettings], base_dir: Path) -> list[str]:
    """Hashes of the files that rewards are defined in; empty where it is this package.

    Args:
        rewards: the rewards.
        base_dir: folder that their paths are relative to.
    """
    return [_source(each.path, base_dir) for each in rewards]


def _source(path: str, base_dir: Path) -> str:
    location = path.rpartition(":")[0] or path
    if location in ("builtin", "trl", "memory"):
        return ""
    for folder in (base_dir, Path()):
        file = folder / location
        if file.suffix == ".py" and file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
    name = location if ":" in path else path.rpartition(".")[0]
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return ""
    origin = None if found is None or found.origin is None else Path(found.origin)
    if origin is None or not origin.is_file():
        return ""
    return hashlib.sha256(origin.read_bytes()).hexdigest()


def _read(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of a cell; None where there is none, or a damaged or another one."""
    try:
        stored = json_text.loads(read_bytes(path, _MOST_BYTES))
        content = stored["content"] if stored["key"] == key else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return content if isinstance(content, dict) else None
