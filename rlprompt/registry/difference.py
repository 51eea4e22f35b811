"""How two artifacts differ: in text, in numbers, and in what they were made with."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprompt.artifacts.format import ArtifactInfo, read_artifact_info
from rlprompt.errors import InputError
from rlprompt.reading.files import reason
from rlprompt.reading.tensors import read_tensors

_ASIDE = ("recipe", "metrics", "created", "certificate", "init_text", "schema_version")


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor of two prompts differs."""

    name: str
    """Name of the tensor."""
    cosine: float | None
    """Cosine similarity of all entries; None where the shapes differ or one has no length."""
    relative: float | None
    """Norm of the difference over the norm of the first; None likewise."""
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    """Shapes; None where one has no such tensor."""


@dataclass(frozen=True)
class ArtifactDifference:
    """How two artifacts differ."""

    text: tuple[str, ...]
    """Unified diff of the texts that they are, or started from; empty = equal."""
    fields: Mapping[str, tuple[Any, Any]]
    """Descriptions that differ: representation, base, template and the like."""
    recipe: Mapping[str, tuple[Any, Any]]
    """Keys of the recipe that differ, by dotted path; None where one has no such key."""
    metrics: Mapping[str, tuple[Any, Any]]
    """All measured numbers of either that differ."""
    tensors: tuple[TensorDifference, ...]
    """Tensors of either, in order."""


def difference(one: Path, other: Path) -> ArtifactDifference:
    """How the second artifact differs from the first.

    Args:
        one: folder of the first artifact.
        other: folder of the second artifact.

    Raises:
        InputError: one of them is no artifact, or damaged.
    """
    first, second = read_artifact_info(one), read_artifact_info(other)
    lines = difflib.unified_diff(
        first.init_text.splitlines(), second.init_text.splitlines(), "first", "second", lineterm=""
    )
    return ArtifactDifference(
        text=tuple(lines),
        fields=_differing(_described(first), _described(second)),
        recipe=_differing(dict(_flat(first.recipe)), dict(_flat(second.recipe))),
        metrics=_differing(dict(_flat(first.metrics)), dict(_flat(second.metrics))),
        tensors=_tensors(one, other),
    )


def _described(info: ArtifactInfo) -> dict[str, Any]:
    return {key: value for key, value in info.model_dump().items() if key not in _ASIDE}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = [*one, *(key for key in other if key not in one)]
    pairs = {key: (one.get(key), other.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists by dotted path."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list) and tree:
        for place, value in enumerate(tree):
            yield from _flat(value, f"{path}.{place}")
    else:
        yield path, tree


def _tensors(one: Path, other: Path) -> tuple[TensorDifference, ...]:
    first, second = _read(one), _read(other)
    found = []
    for name in sorted(first.keys() | second.keys()):
        a, b = first.get(name), second.get(name)
        shapes = (None if a is None else tuple(a.shape), None if b is None else tuple(b.shape))
        if a is None or b is None or a.shape != b.shape:
            found.append(TensorDifference(name, None, None, shapes))
            continue
        flat, changed = a.double().flatten(), b.double().flatten()
        norms = float(flat.norm()), float(changed.norm())
        cosine = float(flat @ changed) / (norms[0] * norms[1]) if all(norms) else None
        relative = float((changed - flat).norm()) / norms[0] if norms[0] else None
        found.append(TensorDifference(name, cosine, relative, shapes))
    return tuple(found)


def _read(folder: Path) -> Mapping[str, Any]:
    path = Path(folder) / "prompt.safetensors"
    if not path.is_file():
        return {}
    try:
        return read_tensors(path)
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise InputError(f"'{path}' cannot be read ({why}); copy the artifact again") from error
