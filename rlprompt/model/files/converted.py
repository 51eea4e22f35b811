"""Models of the user's own in the cache: what `rlprompt model convert` has made, by name.

Each is a folder beside the embedded models, with a manifest that says what it was made from. This
module does not import torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rlprompt.errors import InputError
from rlprompt.model.files.fetch import (
    EMBEDDED,
    MANIFEST,
    ModelRow,
    cache_dir,
    missing_file,
    model_dir,
)
from rlprompt.reading import json_text
from rlprompt.reading.files import read_bytes

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def require_name(name: str) -> None:
    """Refuse what cannot be the name of a converted model.

    Args:
        name: name that a user gave.

    Raises:
        InputError: it is an embedded model's, or has characters that a name has not.
    """
    if name in EMBEDDED:
        raise InputError(
            f"{name!r} is the name of an embedded model, which a conversion would hide: give the "
            "model another name."
        )
    if not NAME.fullmatch(name) or name.endswith("."):
        raise InputError(
            f"{name[:80]!r} cannot be the name of a model: use up to 100 letters, digits, dots, "
            "hyphens and underscores, with a letter or digit first."
        )


def is_converted(name: str) -> bool:
    """Whether the cache has a model of that name that was converted, whole or damaged."""
    return NAME.fullmatch(name) is not None and read_manifest(name) is not None


def read_manifest(name: str) -> dict[str, Any] | None:
    """What the cache says of a converted model; None = there is none of that name."""
    if name in EMBEDDED:
        return None
    try:
        manifest = json_text.loads(read_bytes(model_dir(name) / MANIFEST))
        source = manifest["source"]
        known = isinstance(source["sha256"], str) and isinstance(manifest["fingerprint"], str)
        sizes = manifest["files"]
        known = known and all(isinstance(size, int) for size in sizes.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError):
        return None
    return manifest if known and isinstance(manifest, dict) else None


def converted_folder(name: str) -> Path:
    """The folder of a converted model.

    Args:
        name: name for which `is_converted` holds.

    Raises:
        InputError: files of it are missing or have changed in size.
    """
    manifest = read_manifest(name) or {"files": {}}
    folder = model_dir(name)
    wrong = missing_file(folder, manifest["files"])
    if wrong is not None:
        raise InputError(
            f"The converted model {name} in {folder} is damaged ({wrong}): convert it again with "
            "--force."
        )
    return folder


def list_converted() -> list[ModelRow]:
    """Every converted model of the cache, by name."""
    try:
        names = sorted(entry.name for entry in (cache_dir() / "models").iterdir())
    except (OSError, InputError):
        return []
    rows = []
    for name in names:
        manifest = read_manifest(name) if NAME.fullmatch(name) else None
        if manifest is not None:
            source = manifest["source"]
            rows.append(
                ModelRow(
                    name=name,
                    description=f"converted from {source.get('file', 'a GGUF file')}",
                    licence=str(manifest.get("licence", "not said")),
                    download_bytes=None,
                    fetched=missing_file(model_dir(name), manifest["files"]) is None,
                    folder=model_dir(name),
                )
            )
    return rows
