"""JSON (RFC 8259), read strictly: what only Python's reader would take is an error.

Refused are NaN and infinities, a key that stands twice in one object, numbers that no 64-bit
integer or double holds, halves of surrogate pairs, and nesting that later code could not walk.
"""

from __future__ import annotations

import json
import math
from typing import Any

MOST_LEVELS = 64
"""Lists and objects that may stand inside one another."""
_LARGEST_INTEGER = 1 << 63


class _RefusedError(ValueError):
    """What the hooks of the parser object to."""


def loads(text: str | bytes, *, surrogates: bool = False, lenient: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: text, or its bytes in UTF-8.
        surrogates: whether halves of surrogate pairs may stand in strings, as logs of what a model
            wrote have them.
        lenient: whether a key may stand twice (the last one counts) and numbers need not be finite,
            as in what other programs have written.

    Raises:
        json.JSONDecodeError: it is no JSON, or more than any reader here has to take; `msg` says
            what, in words that fit into a sentence.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise json.JSONDecodeError("not UTF-8 text", "", 0) from error
    try:
        value = json.loads(
            text,
            parse_constant=float if lenient else _refuse_constant,
            parse_int=_integer,
            parse_float=float if lenient else _float,
            object_pairs_hook=dict if lenient else _object,
        )
    except RecursionError as error:
        raise json.JSONDecodeError(_TOO_DEEP, text, 0) from error
    except _RefusedError as error:
        raise json.JSONDecodeError(str(error), text, 0) from error
    _check(value, text, surrogates)
    return value


_TOO_DEEP = f"more than {MOST_LEVELS} levels inside one another"


def _refuse_constant(name: str) -> float:
    raise _RefusedError(f"{name} is no number in JSON, write null")


def _integer(digits: str) -> int:
    # Twenty digits and a sign: Python's own limit is 4,300 digits, and its error a traceback.
    if len(digits) > 20 or not -_LARGEST_INTEGER <= (value := int(digits)) < 2 * _LARGEST_INTEGER:
        raise _RefusedError(f"the integer {digits[:12]}... needs more than 64 bits")
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _RefusedError(f"the number {digits[:24]} is too large")
    return value


def _object(members: Any) -> dict[str, Any]:
    """The object of a list of names and values."""
    made: dict[str, Any] = dict(members)
    if len(made) < len(members):
        names = [name for name, _ in members]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RefusedError(f"the key {twice[:40]!r} stands twice in one object")
    return made


def _check(value: Any, text: str, surrogates: bool) -> None:
    """Refuse nesting beyond the limit, and halves of surrogate pairs."""
    level = [value]
    depth = 0
    checks_text = not surrogates and "\\u" in text
    while level:
        if depth > MOST_LEVELS:
            raise json.JSONDecodeError(_TOO_DEEP, text, 0)
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += each.values()
                if checks_text:
                    below += each
            elif isinstance(each, list):
                below += each
            elif checks_text and isinstance(each, str) and not is_text(each):
                raise json.JSONDecodeError("half of a surrogate pair, which is no text", text, 0)
        level = below
        depth += 1


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
