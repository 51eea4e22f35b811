"""`rlprompt artifact`: what its commands do and print."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from rlprompt.artifacts.certificate import read_certificate
from rlprompt.artifacts.format import SCHEMA_VERSION, check_files, read_artifact_info
from rlprompt.artifacts.identity import artifact_files, content_hash, prompt_hash
from rlprompt.artifacts.migration import migrate_artifact
from rlprompt.artifacts.signature import read_signature, sign_artifact, verify_signature
from rlprompt.files import claim_empty_folder, to_json
from rlprompt.serving.loaded import artifact_folder


def sign(artifact: Path, key: Path) -> None:
    """Sign an artifact and say what was signed.

    Args:
        artifact: folder of the artifact, or of a run.
        key: file of a private key.

    Raises:
        InputError: see `sign_artifact`; or the artifact is damaged.
    """
    folder = artifact_folder(artifact)
    check_files(folder)
    done = sign_artifact(folder, key)
    _say(f"signed content {done.content} with the key {done.public_key}")


def verify(artifact: Path, key: Path | None, *, as_json: bool) -> None:
    """Check an artifact's files and say what they are.

    Args:
        artifact: folder of the artifact, or of a run.
        key: file of the public key that must have signed it; None = any, or none.
        as_json: whether JSON is printed.

    Raises:
        InputError: something is wrong with it, or that key has not signed it.
    """
    folder = artifact_folder(artifact)
    info = check_files(folder)
    certificate = read_certificate(folder)
    signature = read_signature(folder) if key is None else verify_signature(folder, key)
    report: dict[str, Any] = {
        "schema_version": info.schema_version,
        "representation": info.representation,
        "base": info.base,
        "content": content_hash(folder),
        "prompt": prompt_hash(folder),
        "certificate": None if certificate is None else certificate.statement,
        "signed_by": None if signature is None else signature.public_key,
        "signature_verified": key is not None,
    }
    if as_json:
        sys.stdout.write(to_json(report, indent=1) + "\n")
        return
    _say(f"{info.representation} prompt for {_shown(info.base)}, version {info.schema_version}")
    _say(f"content {report['content']}")
    _say(f"prompt  {report['prompt']}")
    _say(f"certificate: {'none' if certificate is None else 'belongs to this prompt'}")
    if signature is None:
        _say("signature: none")
    elif key is None:
        _say(f"signature: of these files, by {signature.public_key}; give --key to prove whose")
    else:
        _say(
            f"signature: of these files, made with the key of {key} on {_shown(signature.created)}"
        )


def migrate(artifact: Path, output: Path | None) -> None:
    """Migrate an artifact and say from which version.

    Args:
        artifact: folder of the artifact, or of a run.
        output: folder that a copy goes to; None = in its place.

    Raises:
        InputError: see `migrate_artifact`; or the output is there already.
    """
    folder = artifact_folder(artifact)
    read_artifact_info(folder)
    if output is not None:
        with claim_empty_folder(output) as fresh:
            for name in artifact_files(folder, follow_links=True):
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, fresh / name)
            before = migrate_artifact(fresh)
        folder = output
    else:
        before = migrate_artifact(folder)
    if before == SCHEMA_VERSION:
        _say(f"'{folder}' has version {SCHEMA_VERSION} already; nothing was changed")
    else:
        _say(f"'{folder}': version {before} is now {SCHEMA_VERSION}; the prompt is the same")


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:200]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
