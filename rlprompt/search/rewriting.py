"""What a writer is asked for when a language model makes new system texts, and what it said.

Three requests: the same in other words, the best of two, and a better one after a look at bad
answers. A request holds candidates, outputs, scores and what rewards noted in words; no training
query stands in it, though an output may quote one. What comes back is text of a model: `proposed`
takes the instruction out of it, and whether that may be tried is decided by `admission`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlprompt.errors import shorten
from rlprompt.types import Query

SYSTEM = "You improve the instructions that another assistant is given."
"""The system text of every request."""
_MOST_SHOWN = 300
"""Characters of an answer, or of a note, that a request shows."""
_ONLY = "Write only the new instruction."
OWN_WORDS = (
    "Say the same in other words, as clearly as you can. Write only the new instruction.",
    "Join the best of both into one instruction. Write only the new instruction.",
    "Write an instruction under which it would answer better, whatever it is asked. Do not quote "
    "the answers. Write only the new instruction.",
    "These two instructions were given to an assistant.",
    "This instruction is given to an assistant:",
    "These of its answers scored worst:",
)
"""Sentences of the requests, which do not belong into what is proposed."""

_FENCE = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_OPENING = re.compile(
    r"\A(?:(?:sure|certainly|of course|okay|ok|absolutely|great)[,.!:]*\s+)?"
    r"(?:here(?: is|'s|\u2019s| are)\b[^\n:]{0,80}:\s*)?",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"\A[*#\s]*(?:the )?(?:new|improved|revised|better|final|rewritten|updated)?\s*"
    r"(?:system )?(?:instruction|prompt|message|text|version)s?\s*\d*[*\s]*:[*\s]*",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "\xab": "\xbb", "`": "`"}
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|\Z)|[\u3002\uff01\uff1f]")


@dataclass(frozen=True)
class Failure:
    """A bad completion of a candidate, as a request shows it."""

    output: str
    score: float
    notes: tuple[str, ...] = ()
    """What rewards said of it in words."""


def rephrasing(text: str) -> Query:
    """A request for the same instruction in other words."""
    return _query(
        f"This instruction is given to an assistant:\n\n{text}\n\n"
        f"Say the same in other words, as clearly as you can. {_ONLY}"
    )


def blending(one: str, other: str) -> Query:
    """A request for an instruction that joins the best of two."""
    return _query(
        f"These two instructions were given to an assistant.\n\nFirst:\n{one}\n\n"
        f"Second:\n{other}\n\nJoin the best of both into one instruction. {_ONLY}"
    )


def reflection(text: str, failures: Sequence[Failure]) -> Query:
    """A request for a better instruction, after a look at answers that scored badly.

    Args:
        text: instruction that the answers were given under.
        failures: answers, the worst first.
    """
    shown = []
    for place, each in enumerate(failures, start=1):
        lines = [f"Answer {place} (score {each.score:.3g}): {shorten(each.output, _MOST_SHOWN)}"]
        lines += [f"What was wrong: {shorten(note, _MOST_SHOWN)}" for note in each.notes]
        shown.append("\n".join(lines))
    answers = "\n\n".join(shown)
    return _query(
        f"This instruction is given to an assistant:\n\n{text}\n\n"
        f"These of its answers scored worst:\n\n{answers}\n\n"
        "Write an instruction under which it would answer better, whatever it is asked. Do not "
        f"quote the answers. {_ONLY}"
    )


def proposed(answer: str) -> str:
    """The instruction in what a writer said; empty where there is none.

    Taken away are a fence around it, an opening such as "Sure, here is the new instruction:", a
    label, quotation marks around all of it, and a last sentence that was cut off.
    """
    text = answer.strip()
    fenced = _FENCE.search(text)
    if fenced is not None:
        text = fenced.group(1).strip()
    text = _OPENING.sub("", text, count=1)
    text = _LABEL.sub("", text, count=1).strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    ends = list(_SENTENCE_END.finditer(text))
    return text[: ends[-1].end()] if ends else text


def _query(content: str) -> Query:
    return Query(({"role": "user", "content": content},))
