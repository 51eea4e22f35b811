"""Artifacts of earlier versions, written anew in the present one.

Only prompt.json and the card change. That nothing else did is proven before anything is written:
the prompt's hash, and with it a certificate, stays what it was.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from rlprompt.artifacts.card import card
from rlprompt.artifacts.certificate import read_certificate
from rlprompt.artifacts.format import SCHEMA_VERSION, ArtifactInfo, read_artifact_info
from rlprompt.artifacts.identity import SIGNATURE, artifact_files, content_hash, prompt_hash
from rlprompt.errors import InputError
from rlprompt.files import to_json, write_atomic

_REWRITTEN = ("prompt.json", "README.md")


def migrate_artifact(folder: Path) -> int:
    """Bring an artifact to the present version, in its place.

    Args:
        folder: folder of the artifact.

    Returns:
        The version that it had; the present one means that nothing was done.

    Raises:
        InputError: it is damaged, of a newer version, or signed; or it cannot be written.
    """
    folder = Path(folder)
    info = read_artifact_info(folder)
    if info.schema_version == SCHEMA_VERSION:
        return SCHEMA_VERSION
    if (folder / SIGNATURE).exists():
        raise InputError(
            f"'{folder}' is signed, and the signature would not hold for the files of version "
            f"{SCHEMA_VERSION}; remove {SIGNATURE}, migrate, and sign it again"
        )
    certificate = read_certificate(folder)
    statement = None if certificate is None else {"statement": certificate.statement}
    fresh = info.model_copy(update={"schema_version": SCHEMA_VERSION})
    written = {
        "README.md": card({**fresh.model_dump(), "certificate": statement or info.certificate}),
        "prompt.json": to_json(fresh.model_dump(), indent=2),
    }
    _check(folder, fresh, written)
    try:
        for name, content in written.items():
            write_atomic(folder / name, content)
    except OSError as error:
        raise InputError(
            f"'{folder}' cannot be written ({error.strerror}); copy it to a folder that can"
        ) from error
    return info.schema_version


def _check(folder: Path, fresh: ArtifactInfo, written: dict[str, str]) -> None:
    """Prove on a copy that the prompt stays the same, to the byte.

    Raises:
        InputError: it would not, which is a fault of the artifact's description.
    """
    with tempfile.TemporaryDirectory(prefix="rlprompt-migrate-") as temporary:
        copy = Path(temporary) / "artifact"
        for name in artifact_files(folder, follow_links=True):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, copy / name)
        for changed, content in written.items():
            (copy / changed).write_text(content, encoding="utf-8")
        is_same = read_artifact_info(copy) == fresh and prompt_hash(copy) == prompt_hash(folder)
        is_same &= content_hash(copy, _REWRITTEN) == content_hash(folder, _REWRITTEN)
    if not is_same:
        raise InputError(
            f"'{folder}' cannot be migrated without changing its prompt, as prompt.json does not "
            "describe it strictly; load it with the rlprompt that wrote it, and save it again"
        )
