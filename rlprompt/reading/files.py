"""Regular files of a bounded size: no pipe, device or socket is ever waited for."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rlprompt.errors import InputError

TEXT_BYTES = 8 << 20
"""Most that a recipe, a template, or a description in JSON may have."""
DATA_BYTES = 4 << 30
"""Most that a dataset or a file of tensors may have."""

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
)


class UnreadableError(OSError):
    """A path that is no regular file, or too large a one; `strerror` says which."""


def read_bytes(path: Path | str, most: int = TEXT_BYTES) -> bytes:
    """The content of a regular file.

    Args:
        path: path of the file; symbolic links are followed.
        most: bytes that it may have.

    Raises:
        OSError: it is not there or cannot be read; of the class `UnreadableError` where it is no
            regular file or has more bytes.
    """
    descriptor = open_regular(path)
    with open(descriptor, "rb") as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise UnreadableError(0, f"it has more than {in_words(most)}", str(path))
    return content


def read_text(path: Path | str, most: int = TEXT_BYTES) -> str:
    """The UTF-8 text of a regular file; every end of a line is a line feed.

    Raises:
        OSError: see `read_bytes`.
        UnicodeDecodeError: it is no UTF-8.
    """
    text = read_bytes(path, most).decode("utf-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def open_regular(path: Path | str) -> int:
    """A descriptor of a regular file, open for reading; the caller closes it.

    Raises:
        OSError: it is not there or cannot be read; of the class `UnreadableError` where it is no
            regular file.
    """
    try:
        # Asked before it is opened: to open a device can change it.
        _require_regular(os.stat(path).st_mode, path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise UnreadableError(0, "its name cannot be that of a file", repr(str(path))) from error
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def require_regular(path: Path | str) -> None:
    """Refuse a path that a library is about to open by itself and that is no regular file.

    Raises:
        OSError: see `open_regular`.
    """
    os.close(open_regular(path))


def _require_regular(mode: int, path: Path | str) -> None:
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "no regular file")
        raise UnreadableError(0, f"it is {kind}", str(path))


def expanded(path: str, what: str) -> Path:
    """A path with `~` replaced by the home folder.

    Args:
        path: path as the user wrote it.
        what: name of the path in an error, such as `data.path`.

    Raises:
        InputError: there is no such user, or the text cannot be a path.
    """
    if "\0" in path:
        raise InputError(f"{what} is {path!r}, which holds a NUL and cannot be a path; correct it")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{what} is {path!r}, and no user of that name has a home folder here; write the path "
            "in full, or ./ in front of a name that begins with ~"
        ) from error


def reason(error: OSError | UnicodeError) -> str:
    """Why a file could not be read, in a few words."""
    if isinstance(error, UnicodeError):
        return "it is not UTF-8 text"
    return " ".join((error.strerror or str(error) or type(error).__name__).split())


def in_words(count: int) -> str:
    """A number of bytes in a unit that suits it."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
