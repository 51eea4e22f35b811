"""The one error that is the user's to mend, and the pieces of its sentences.

Everything a user can get wrong (a recipe, a model path, a reward, a dataset, an artifact) raises
`InputError` with one sentence: what was wrong, where, and what to do. The command line prints that
sentence and nothing else. Any other exception is a defect of rlprompt or of the machine.
"""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterable
from difflib import get_close_matches


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


def describe_error(error: BaseException) -> str:
    """Type and message of an exception, on one line."""
    return f"{type(error).__name__}: {shorten(str(error), 300)}"


def user_frame(error: BaseException, filename: str | None = None) -> str:
    """`path:line (source)` of the deepest frame in `filename`, or of the deepest one at all."""
    # The file of a SyntaxError is the one that was parsed; "<unknown>" when that was a string.
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        return f"{error.filename}:{error.lineno} ({(error.text or '').strip()})"
    frames = traceback.extract_tb(error.__traceback__)
    chosen = [frame for frame in frames if frame.filename == filename] or list(frames)
    if not chosen:
        return "an unknown line"
    # Not frame.line: linecache is stale when the file was edited since its module was last loaded.
    linecache.checkcache(chosen[-1].filename)
    source = linecache.getline(chosen[-1].filename, chosen[-1].lineno or 0).strip()
    return f"{chosen[-1].filename}:{chosen[-1].lineno} ({source})"
