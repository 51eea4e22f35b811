"""Frames, small sets of questions and neutral texts that ship, for suites and augmentation.

All of it was written for this project. The sets are small: they find a large change, and say
nothing about a small one; the intervals beside every number tell how small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rlprompt.reading import json_text, yaml_text
from rlprompt.reading.files import read_text

_SHIPPED = Path(__file__).parent / "shipped"
"""Where the files lie, in a checkout and in a wheel."""

QUERY = "{query}"
"""What stands for a user's turn in a frame."""
PROMPT = "{prompt}"
"""What stands for the prompt in a frame of the system turn."""


@cache
def frames() -> Mapping[str, Sequence[str]]:
    """The shipped frames and other lists of sentences, by name."""
    found: Mapping[str, Sequence[str]] = yaml_text.load(read_text(_SHIPPED / "frames.yaml"))
    return found


@cache
def rows(name: str) -> Sequence[Mapping[str, Any]]:
    """The rows of a shipped set.

    Args:
        name: `choices`, `exact`, `general` or `neutral`.
    """
    lines = read_text(_SHIPPED / f"{name}.jsonl").splitlines()
    return [json_text.loads(line) for line in lines]


def filled(frame: str, query: str) -> str:
    """A frame with a user's turn in it.

    Args:
        frame: the frame, with `{query}` once or more.
        query: the turn; braces in it stay as they are.
    """
    return frame.replace(QUERY, query)
