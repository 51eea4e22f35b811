"""What an artifact is called by: hashes over its files.

Two questions, one answer each:

- `content_hash`: is this the same artifact, to the byte? The registry keeps artifacts under it, and
  a signature signs it.
- `prompt_hash`: is this the same prompt? Cards, metrics, certificates and signatures may differ.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path

from rlprompt.errors import InputError
from rlprompt.reading import json_text
from rlprompt.reading.files import (
    DATA_BYTES,
    UnreadableError,
    in_words,
    open_regular,
    read_bytes,
    reason,
)

CERTIFICATE = "certificate.json"
"""File of what has been certified of a prompt."""
SIGNATURE = "signature.json"
"""File of who vouches for an artifact."""
MOST_FILES = 256
"""Files that an artifact may have."""
MOST_BYTES = 4 * DATA_BYTES
"""Bytes that all of them may have together."""

_NOT_THE_PROMPT = (CERTIFICATE, SIGNATURE, "README.md", "prompt.json")
_CHUNK = 1 << 20


def artifact_files(folder: Path, *, follow_links: bool = False) -> list[Path]:
    """The files of an artifact, relative to its folder, in order.

    Hidden files are left out, as they are those of whoever writes at this moment.

    Args:
        folder: folder of the artifact.
        follow_links: whether a link to a file counts as the file, as in caches of downloads.

    Raises:
        InputError: it holds something that is no regular file, or too many of them.
    """
    found: list[Path] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        is_link = path.is_symlink() and not (follow_links and path.is_file())
        if is_link or not (path.is_file() or path.is_dir()):
            raise InputError(
                f"'{path}' is no regular file, and an artifact holds nothing else; remove it"
            )
        if path.is_file():
            found.append(name)
        if len(found) > MOST_FILES:
            raise InputError(
                f"'{folder}' has more than {MOST_FILES} files, which no artifact has; name the "
                "artifact's own folder"
            )
    return found


def content_hash(folder: Path, without: Collection[str] = ()) -> str:
    """sha256 over the names and contents of all files of an artifact: its identity.

    Args:
        folder: folder of the artifact.
        without: files that are left out, by relative path.

    Raises:
        InputError: see `artifact_files`; or a file cannot be read, or all are larger than any
            artifact.
    """
    digest = hashlib.sha256()
    total = 0
    for name in artifact_files(folder):
        if name.as_posix() in without:
            continue
        shown = name.as_posix().encode("utf-8", "surrogateescape")
        try:
            size = (folder / name).stat().st_size
            digest.update(f"{len(shown)} {size}\n".encode() + shown)
            _add_file(digest, folder / name, size)
        except OSError as error:
            raise InputError(
                f"'{folder / name}' cannot be read ({reason(error)}); copy the artifact again"
            ) from error
        total += size
        if total > MOST_BYTES:
            raise InputError(
                f"the files of '{folder}' have more than {in_words(MOST_BYTES)}, which no artifact "
                "has; name the artifact's own folder"
            )
    return digest.hexdigest()


def prompt_hash(folder: Path) -> str:
    """sha256 over what an artifact's prompt is: its files, kind, text, base and chat template.

    Name, card, recipe and metrics may change without making it another prompt.

    Args:
        folder: folder of the artifact.

    Raises:
        InputError: it cannot be read.
    """
    folder = Path(folder)
    try:
        content = json_text.loads(read_bytes(folder / "prompt.json"))
        own = {
            key: content.get(key)
            for key in (
                "representation", "num_virtual_tokens", "init_text", "details",
                "base_fingerprint", "template_hash",
            )
        }  # fmt: skip
        own["details"] = own["details"] or {}  # version 1 has none
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
        for path in artifact_files(folder, follow_links=True):
            name = path.as_posix()
            if name not in _NOT_THE_PROMPT:
                digest.update(f"\n{name}\n".encode("utf-8", "surrogateescape"))
                part = hashlib.sha256()
                _add_file(part, folder / path, (folder / path).stat().st_size)
                digest.update(part.digest())
    except (OSError, ValueError, AttributeError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise InputError(
            f"the artifact '{folder}' cannot be read ({why}); copy it again"
        ) from error
    return digest.hexdigest()


def _add_file(digest: hashlib._Hash, path: Path, size: int) -> None:
    """Add the content of a regular file of a known size to a hash, without holding it."""
    if size > DATA_BYTES:
        raise UnreadableError(0, f"it has more than {in_words(DATA_BYTES)}", str(path))
    read = 0
    with os.fdopen(open_regular(path), "rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
            read += len(chunk)
            if read > size:
                break
    if read != size:
        raise UnreadableError(0, "it changes while it is read", str(path))
