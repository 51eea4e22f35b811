"""Files of the run folder: whole files written atomically, and JSON Lines that survive a crash.

A run can be killed at any moment and must be readable and resumable afterwards. A whole file is
therefore either the old one or the new one, never half of one; a log file is appended line by line,
so that only its last line can be torn, and a resumed run drops that line together with the rows of
the steps that it is about to repeat.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from rlprompt.errors import InputError
from rlprompt.reading import json_text
from rlprompt.reading.files import UnreadableError, open_regular

_AT_FDCWD = -100
_EXCHANGE = 2
"""RENAME_EXCHANGE of Linux."""


def write_atomic(path: Path | str, data: bytes | str, *, private: bool = False) -> None:
    """Write a whole file so that a reader, or a crash, sees the old content or the new one.

    The folder must exist. Text is written as UTF-8. The file and its folder entry are on disk when
    this returns.

    Args:
        path: the file.
        data: the content.
        private: whether only its owner may read it, at no moment anybody else.

    Raises:
        OSError: if the folder is missing, not writable or full; the old file is then untouched.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    # Not `tempfile`, whose files are private: a run folder is shared like any other output.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        mode = 0o600 if private else 0o666
        with open(temporary, "xb", opener=lambda name, how: os.open(name, how, mode)) as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def replace_folder(fresh: Path, target: Path) -> None:
    """Put a folder in the place of another one, or of nothing.

    On Linux both change places in one step, so that a reader, or a crash, sees the old folder or
    the new one. Where the file system cannot do that, nothing is there for an instant.

    Args:
        fresh: folder that takes the place; on the same file system.
        target: the place.

    Raises:
        OSError: it cannot be written; the old folder is then untouched.
    """
    if not target.exists():
        os.replace(fresh, target)
    else:
        aside = fresh
        if not _exchange(fresh, target):
            aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
            os.replace(target, aside)
            os.replace(fresh, target)
        shutil.rmtree(aside, ignore_errors=True)
    _sync_folder(target.parent)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """A block that writes into a folder, which is made where it is not there.

    Args:
        folder: the folder.

    Raises:
        InputError: it cannot be made, or what the block writes cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(
            f"'{folder}' cannot be written ({error.strerror or error}); name a folder that can"
        ) from error


@contextmanager
def claim_empty_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which gets its place and name when all went well.

    Otherwise nothing of it stays.

    Args:
        target: the folder that is to be made.

    Raises:
        InputError: it is there and not empty, or no folder, or cannot be written.
    """
    target = Path(os.path.abspath(target))
    try:
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise InputError(f"'{target}' is there and no folder; name one that is not there yet")
        if target.is_dir() and any(target.iterdir()):
            raise InputError(f"'{target}' is not empty; name a folder that is not there yet")
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}.new")
        fresh.mkdir()
        try:
            yield fresh
            if target.is_dir():
                target.rmdir()
            os.replace(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        _sync_folder(target.parent)
    except OSError as error:
        raise InputError(
            f"'{target}' cannot be written ({error.strerror or error}); name a folder that can"
        ) from error


def _exchange(one: Path, two: Path) -> bool:
    """Let two folders change places in one step; says whether that was possible."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc 2.28 or newer
    if rename is None:
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _EXCHANGE)
    return done == 0


def to_json(value: Any, indent: int | None = None) -> str:
    """Render a value as strictly valid JSON: NaN and infinities become null.

    Numbers of numpy and paths are accepted beside the plain types.

    Raises:
        TypeError: if the value holds something that has no JSON form.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


class JsonlWriter:
    """Appends one JSON object per line and hands each line to the operating system at once.

    Args:
        path: The file; its folder is created.
        resume_step: The step of the checkpoint that the run continues from: rows with a larger
            `step` are dropped, and so is a torn last line. None for a new run; -1 keeps no row, for
            a run that is resumed before its first checkpoint.

    Raises:
        InputError: if a new run finds rows of another run in the file, or if a line other than a
            torn last one is not a JSON object.
    """

    def __init__(self, path: Path | str, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size:
            if resume_step is None:
                raise InputError(
                    f"'{self.path}' already holds the rows of another run; resume that run, or "
                    "choose another output folder."
                )
            _truncate(self.path, resume_step)
        # Unbuffered: a line is one write, so a killed process loses no line that was written.
        self._handle: FileIO = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row.

        Raises:
            TypeError: if a value has no JSON form; nothing is written then.
            OSError: if the disk is full; the last line may be torn then.
        """
        # A lone surrogate cannot be UTF-8; as `\udXXX` it is a JSON escape, so nothing is lost.
        line = (to_json(row) + "\n").encode("utf-8", "backslashreplace")
        written = self._handle.write(line)
        while written < len(line):
            written += self._handle.write(line[written:])

    def close(self) -> None:
        """Put the rows on disk and close the file; closing twice is fine."""
        if not self._handle.closed:
            os.fsync(self._handle.fileno())
            self._handle.close()


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Read the rows of a JSON Lines file, without its last line if that one is torn.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if any other line is not a JSON object.
    """
    return list(iter_jsonl(path))


def iter_jsonl(path: Path | str) -> Iterator[dict[str, Any]]:
    """Yield what `read_jsonl` returns, for files that need not be held in memory."""
    for _, row in _read_lines(Path(path)):
        yield row


def _read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each complete line, without its end, and its row; blank lines are passed over."""
    # In binary, only a line feed ends a line; a completion may hold other separators as they are.
    try:
        descriptor = open_regular(path)
    except UnreadableError as error:
        raise InputError(
            f"'{path}' cannot be read ({error.strerror}); put the file of the run there."
        ) from error
    with open(descriptor, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                row = json_text.loads(line, surrogates=True)
            except ValueError as error:
                # Only what no line feed follows can be a write that was cut short.
                if not line.endswith(b"\n"):
                    return
                raise InputError(
                    f"'{path}' line {number} is not valid JSON ({error}); remove that line."
                ) from error
            if not isinstance(row, dict):
                raise InputError(f"'{path}' line {number} is not a JSON object; remove that line.")
            yield line.rstrip(b"\n"), row


def _truncate(path: Path, resume_step: int) -> None:
    kept = [line for line, row in _read_lines(path) if row.get("step", resume_step) <= resume_step]
    write_atomic(path, b"".join(line + b"\n" for line in kept))


def _plain(value: Any) -> Any:
    """Turn a value into what `json.dumps` accepts without NaN."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
