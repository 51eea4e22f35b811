"""signature.json of an artifact: who vouches for its files, to the byte.

An Ed25519 signature (RFC 8032) over `content_hash` of all files but itself. Where an artifact is
loaded, only the hash is compared, which needs no key: files that were changed after they were
signed are refused. Whose key it was is asked by `verify`, with the `signing` extra.
"""

from __future__ import annotations

import base64
import binascii
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from rlprompt.artifacts.identity import SIGNATURE, content_hash
from rlprompt.errors import InputError
from rlprompt.files import to_json, write_atomic
from rlprompt.reading import json_text
from rlprompt.reading.files import read_bytes, reason
from rlprompt.settings import Settings

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

_DOMAIN = "rlprompt artifact signature 1"
"""First line of what is signed, so that no signature of anything else can be taken for one."""
_KEY_BYTES = 64 << 10


class Signature(Settings):
    """The content of signature.json."""

    schema_version: Literal[1] = 1
    """Version of this format."""
    algorithm: Literal["ed25519"] = "ed25519"
    """How it was signed."""
    content: str = Field(pattern=r"^[0-9a-f]{64}$")
    """`content_hash` of the artifact without this file."""
    created: str = Field(max_length=64)
    """UTC time, ISO 8601; it is signed too."""
    public_key: str = Field(max_length=64)
    """The signer's 32 bytes, base64. Whose it is must be known from elsewhere."""
    signature: str = Field(max_length=128)
    """64 bytes, base64."""

    def message(self) -> bytes:
        """What was signed."""
        return f"{_DOMAIN}\n{self.content}\n{self.created}\n".encode()


def read_signature(folder: Path) -> Signature | None:
    """The signature of an artifact, if it has one, whose files are those that were signed.

    Args:
        folder: folder of the artifact.

    Raises:
        InputError: it is damaged, or the files have changed since they were signed.
    """
    path = Path(folder) / SIGNATURE
    try:
        found = Signature.model_validate(json_text.loads(read_bytes(path)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        raise InputError(
            f"'{path}' is damaged ({why}); copy the artifact again, or remove the file"
        ) from error
    own = content_hash(Path(folder), without=(SIGNATURE,))
    if own != found.content:
        raise InputError(
            f"the files of '{folder}' are not those that were signed (content {own[:12]}, signed "
            f"{found.content[:12]}); copy the artifact again"
        )
    return found


def sign_artifact(folder: Path, key: Path) -> Signature:
    """Sign all files of an artifact, in place of a signature that is there.

    Args:
        folder: folder of the artifact.
        key: file of an Ed25519 private key without a passphrase, PEM or of OpenSSH.

    Raises:
        InputError: there is no such key, or the artifact cannot be read or written.
    """
    private = _private_key(key)
    content = content_hash(Path(folder), without=(SIGNATURE,))
    unsigned = Signature(
        content=content,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        public_key=base64.b64encode(private.public_key().public_bytes_raw()).decode(),
        signature="",
    )
    signed = base64.b64encode(private.sign(unsigned.message())).decode()
    done = unsigned.model_copy(update={"signature": signed})
    try:
        write_atomic(Path(folder) / SIGNATURE, to_json(done.model_dump(), indent=1) + "\n")
    except OSError as error:
        raise InputError(
            f"'{folder}' cannot be written ({error.strerror}); name an artifact that can"
        ) from error
    return done


def verify_signature(folder: Path, key: Path) -> Signature:
    """The signature of an artifact, proven to be of a key.

    Args:
        folder: folder of the artifact.
        key: file of the signer's Ed25519 public key, PEM or of OpenSSH.

    Raises:
        InputError: there is no signature, its files have changed, or another key made it.
    """
    public = _public_key(key)
    found = read_signature(folder)
    if found is None:
        raise InputError(
            f"'{folder}' is not signed (no {SIGNATURE}); ask whoever made it, or sign it with "
            "`rlprompt artifact sign`"
        )
    own = base64.b64encode(public.public_bytes_raw()).decode()
    if found.public_key != own:
        raise InputError(
            f"'{folder}' was signed with the key {found.public_key[:80]!r}, not with that of "
            f"'{key}'; use the signer's key, or do not trust it"
        )
    try:
        public.verify(base64.b64decode(found.signature, validate=True), found.message())
    except (binascii.Error, ValueError, _cryptography().exceptions.InvalidSignature) as error:
        raise InputError(
            f"the signature of '{folder}' was not made with the key of '{key}'; do not trust it"
        ) from error
    return found


def drop_signature(folder: Path) -> bool:
    """Remove a signature from a folder whose files are about to change; says whether one was there.

    Args:
        folder: folder of the artifact.
    """
    path = Path(folder) / SIGNATURE
    was_there = path.is_file()
    path.unlink(missing_ok=True)
    return was_there


def _cryptography() -> Any:
    try:
        import cryptography.exceptions
        import cryptography.hazmat.primitives.asymmetric.ed25519
        import cryptography.hazmat.primitives.serialization
    except ImportError as error:
        raise InputError(
            "signatures need the package cryptography; install it with `pip install "
            "'rlprompt[signing]'`"
        ) from error
    return cryptography


def _private_key(path: Path) -> Ed25519PrivateKey:
    parts = _cryptography().hazmat.primitives
    content = _key_bytes(path, "private")
    load = parts.serialization.load_pem_private_key
    if b"OPENSSH PRIVATE KEY" in content:
        load = parts.serialization.load_ssh_private_key
    try:
        found = load(content, password=None)
    except Exception as error:  # of many kinds: of its own, ValueError, TypeError for a passphrase
        raise _no_key(path, "private", error) from error
    if not isinstance(found, parts.asymmetric.ed25519.Ed25519PrivateKey):
        raise _no_key(path, "private", f"it is of the kind {type(found).__name__}")
    key: Ed25519PrivateKey = found
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    parts = _cryptography().hazmat.primitives
    content = _key_bytes(path, "public")
    load = parts.serialization.load_pem_public_key
    if content.startswith(b"ssh-"):
        load = parts.serialization.load_ssh_public_key
    try:
        found = load(content)
    except Exception as error:  # as above
        raise _no_key(path, "public", error) from error
    if not isinstance(found, parts.asymmetric.ed25519.Ed25519PublicKey):
        raise _no_key(path, "public", f"it is of the kind {type(found).__name__}")
    key: Ed25519PublicKey = found
    return key


def _key_bytes(path: Path, which: str) -> bytes:
    try:
        return read_bytes(path, _KEY_BYTES)
    except OSError as error:
        raise _no_key(path, which, reason(error)) from error


def _no_key(path: Path, which: str, why: object) -> InputError:
    shown = " ".join(str(why).split())[:200]
    return InputError(
        f"'{path}' is no Ed25519 {which} key that can be used ({shown}); make a pair without a "
        "passphrase with `ssh-keygen -t ed25519 -N '' -f KEY`, which writes KEY and KEY.pub"
    )
