"""The one error that is the user's to mend, and the pieces of its sentences.

Everything a user can get wrong (a recipe, a model path, a reward, a dataset, an artifact) raises
`InputError` with one sentence: what was wrong, where, and what to do. The command line prints that
sentence and nothing else. Any other exception is a defect of rlprompt or of the machine.
"""

from __future__ import annotations

import errno
import linecache
import re
import sysconfig
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

_OURS = Path(__file__).parent
_STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])

_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "failed to map segment",
    "out of memory",
    "std::bad_alloc",
)


class InputError(ValueError):
    """A wrong input, described in one sentence that ends with what to do about it.

    The sentence quotes names and values that may come from anywhere. It is one line all the same:
    what would break the line, move the cursor or turn the direction of writing becomes a space.
    """

    def __init__(self, sentence: str = "") -> None:
        """Keep the sentence.

        Args:
            sentence: sentence about what was wrong, where, and what to do; its middle is left out
                where it is longer than any reader would read.
        """
        text = _UNPRINTABLE.sub(" ", str(sentence))
        if len(text) > _LONGEST_SENTENCE:
            half = _LONGEST_SENTENCE // 2
            text = f"{text[:half]} ... {text[-half:]}"
        super().__init__(text)


_LONGEST_SENTENCE = 1400
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters, line separators, marks of direction, and halves of surrogate pairs."""


def shorten(text: str, limit: int = 80) -> str:
    """The text on one line, cut to `limit` characters."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def quote(text: str) -> str:
    """The shortened text in quotes."""
    return f"'{shorten(text)}'"


def choices(wrong: str, known: Iterable[str]) -> str:
    """The end of a sentence about a wrong name: the nearest known one, or all of them."""
    names = sorted(known)
    near = get_close_matches(wrong, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"choose from {', '.join(names)}" if names else "it has none"


def first_error(error: BaseException) -> BaseException:
    """The exception itself, or the first one in a group: the group's own message says nothing."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def describe_error(error: BaseException) -> str:
    """Type and message of an exception, or of the first one in a group, on one line."""
    error = first_error(error)
    try:
        message = str(error)
    except Exception as fault:
        message = f"no message, because str of it raises {type(fault).__name__}"
    return f"{type(error).__name__}: {shorten(message, 300)}"


def is_users(filename: str) -> bool:
    """Whether a source file is neither rlprompt's nor a library's."""
    if filename.startswith("<"):
        return False
    path = Path(filename)
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    return not any(path.is_relative_to(folder) for folder in (_OURS, _STANDARD_LIBRARY))


def source_line(filename: str, line: int) -> str:
    """`path:line (source)` of a line."""
    # Not frame.line: linecache is stale when the file was edited since its module was last loaded.
    linecache.checkcache(filename)
    return f"{filename}:{line} ({linecache.getline(filename, line).strip()})"


def limit_reached(error: BaseException) -> str | None:
    """What an exception says of a limit of the machine, in one sentence; None = nothing.

    Libraries tell of memory that is not there in words and classes of their own.
    """
    text = str(error).lower()
    code = error.errno if isinstance(error, OSError) else None
    # "returned NULL without setting an exception": how CPython ends where it cannot make one.
    unsaid = isinstance(error, SystemError) and "without" in text and "exception" in text
    memory = isinstance(error, MemoryError) or unsaid or code == errno.ENOMEM
    if memory or any(words in text for words in _MEMORY):
        return (
            f"there is not enough memory ({describe_error(error)}); free some, raise the limit if "
            "one is set (`ulimit -v`), or make batches or model smaller"
        )
    if code in (errno.EMFILE, errno.ENFILE) or "too many open files" in text:
        return "too many files are open; raise the limit (`ulimit -n`)"
    if code == errno.EAGAIN or "can't start new thread" in text:
        return f"the system gives no more threads or processes ({error}); raise the limit"
    return None


def machine_fault(error: BaseException) -> str | None:
    """What an exception says of limits, disks and permissions, in one sentence; None = nothing."""
    sentence = limit_reached(error)
    if sentence is None and isinstance(error, OSError) and error.strerror:
        about = "something" if error.filename is None else f"'{error.filename}'"
        return f"{about} cannot be used ({error.strerror}); mend that and try again"
    return sentence


def user_frame(error: BaseException, filename: str | None = None) -> str:
    """`path:line (source)` of the deepest frame in `filename`.

    Where there is none, of the deepest one that is neither rlprompt's nor a library's, or else of
    the deepest one at all.
    """
    error = first_error(error)
    # The file of a SyntaxError is the one that was parsed; "<unknown>" when that was a string.
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        return f"{error.filename}:{error.lineno} ({(error.text or '').strip()})"
    frames = traceback.extract_tb(error.__traceback__)
    chosen = [frame for frame in frames if frame.filename == filename]
    chosen = chosen or [frame for frame in frames if is_users(frame.filename)] or list(frames)
    if not chosen:
        return "an unknown line"
    return source_line(chosen[-1].filename, chosen[-1].lineno or 0)
