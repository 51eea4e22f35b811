"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder `step_000010` with `tensors.safetensors` (prompt, best prompt, optimizer,
random generator) and `state.json` (counters, data position, history, a digest of all this). It is
written beside its final place and renamed, so a folder that has the final name is whole; what a
crash left beside it begins with a dot and is removed by the next save.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.files import to_json, write_atomic
from rlprompt.reading import json_text
from rlprompt.reading.files import DATA_BYTES, read_bytes, reason
from rlprompt.reading.tensors import STORED, parse_tensors

_NAME = re.compile(r"step_(\d+)")
_LEFTOVERS = ".step_*"
_ASIDE = ".old"
FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds."""

    step: int
    """Finished steps."""
    tensors: Mapping[str, Tensor]
    """Flat names, such as `prompt/embeddings`."""
    state: Mapping[str, Any]
    """Plain JSON values."""


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(p.name), p) for p in folder.iterdir()]
    return sorted(int(m[1]) for m, p in found if m and (p / "state.json").exists())


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint and delete all but the newest `keep`.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step_{checkpoint.step:06d}"
    temporary, replaced = folder / f".{target.name}.{uuid.uuid4().hex}", _aside(target)
    try:
        temporary.mkdir()
        tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}
        content = save(tensors)
        write_atomic(temporary / "tensors.safetensors", content)
        state = {"step": checkpoint.step, **checkpoint.state}
        marks = {"format": FORMAT, "digest": _digest(json.loads(to_json(state)), content)}
        write_atomic(temporary / "state.json", to_json(marks | state, indent=1))
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(target, replaced)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_checkpoints(folder)
        raise
    _sync(folder)
    for leftover in folder.glob(_LEFTOVERS):
        shutil.rmtree(leftover, ignore_errors=True)
    for step in checkpoint_steps(folder)[:-keep]:
        old = folder / f"step_{step:06d}"
        hidden = folder / f".{old.name}.{uuid.uuid4().hex}"
        os.replace(old, hidden)  # what a crash leaves half deleted has no final name
        shutil.rmtree(hidden, ignore_errors=True)
    return target


def recover_checkpoints(folder: Path) -> None:
    """Put back what a crash left aside while a checkpoint of the same step took its place."""
    for aside in folder.glob(_aside(folder / "step_*").name):
        target = folder / aside.name.removeprefix(".").removesuffix(_ASIDE)
        if not target.exists() and (aside / "state.json").exists():
            os.replace(aside, target)


def read_progress(folder: Path) -> dict[str, Any] | None:
    """The counters in the newest checkpoint; None where there is none, or it cannot be read."""
    steps = checkpoint_steps(folder)
    if not steps:
        return None
    try:
        state = json_text.loads(read_bytes(folder / f"step_{steps[-1]:06d}" / "state.json"))
        progress = state["progress"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # loading it says what is wrong
    return progress if isinstance(progress, dict) else None


def load_checkpoint(folder: Path, step: int | None = None) -> Checkpoint:
    """Read a checkpoint, the newest when no step is given.

    Raises:
        InputError: there is none, or it is damaged.
    """
    steps = checkpoint_steps(folder)
    if not steps:
        raise InputError(f"'{folder}' has no checkpoint; start a new run")
    step = steps[-1] if step is None else step
    path = folder / f"step_{step:06d}"
    try:
        state = dict(json_text.loads(read_bytes(path / "state.json", DATA_BYTES)))
        written, digest = state.pop("format", None), state.pop("digest", None)
        content = read_bytes(path / "tensors.safetensors", DATA_BYTES)
        tensors = parse_tensors(content, STORED)
        if digest is not None and digest != _digest(state, content):
            raise ValueError("its content is not what was written")
        number = _whole(state.pop("step"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise InputError(
            f"checkpoint '{path}' is damaged ({why}); delete that folder to resume from the one "
            "before"
        ) from error
    if written != FORMAT:
        raise InputError(f"checkpoint '{path}' was written by another version; start a new run")
    return Checkpoint(number, tensors, state)


def _aside(target: Path) -> Path:
    """Where a checkpoint is while another of its step takes its place."""
    return target.with_name(f".{target.name}{_ASIDE}")


def _digest(state: Mapping[str, Any], tensors: bytes) -> str:
    """What changes when anything in a checkpoint does; checkpoints of earlier versions have none.

    It tells damage and mistakes, not a forger: whoever can write the folder can write this too.
    """
    plain = json.dumps(state, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(plain.encode() + hashlib.sha256(tensors).digest()).hexdigest()


def _whole(step: object) -> int:
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"step is {str(step)[:40]!r}, no number of steps")
    return step


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
