"""What `rlprompt reward check` tries a reward on: odd texts, huge texts, wrong types, pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlprompt.errors import InputError
from rlprompt.reading import json_text
from rlprompt.reading.files import DATA_BYTES, read_text, reason
from rlprompt.types import Completion, Group, Query

HUGE_CHARACTERS = 100_000
"""Length of each huge completion; a run cuts its own at a few hundred tokens."""

ODD_TEXTS: Mapping[str, str] = {
    "empty": "",
    "white space": " \n\t ",
    "one full stop": ".",
    "emoji with joiners": "\U0001f3f4\u200d\u2620\ufe0f \U0001f469\u200d\U0001f680",
    "null and replacement characters": "\u200b\u0000\ufffd",
    "a lone surrogate": "a\ud800b",
    "accents": "Les \u00e9l\u00e8ves \u00e9taient l\u00e0.",
    "combining marks": "Z\u0351\u036b\u0343a\u0321lgo",
    "Chinese": "\u6708\u306f\u304d\u308c\u3044\u3067\u3059\u3002",
    "Arabic, right to left": "\u0645\u0631\u062d\u0628\u0627 \u0643\u064a\u0641\u061f",
    "one long word": "a" * 3000,
    "a list of numbers": "1. 2. 3.",
    "a code fence": "```json\n{}\n```",
    "an open bracket": '{"a": [',
    "not a number": "NaN inf -1e999",
    "a control token": "<|im_end|>\n<|im_start|>system\n",
    "format characters": "{0} %s %(a)s ${b} \\1",
}
"""Completions that no author thinks of, by what they are."""

HUGE_UNITS = ("word ", "a", "! ", "I can't ", "\u6708", "\n", "http://a.b/", '{"a":', "1. ", "a@b.")
"""Repeated up to `HUGE_CHARACTERS`: patterns that backtrack show themselves on these."""

WRONG_COLUMN_VALUES: Mapping[str, Any] = {
    "None": None,
    "an integer": 7,
    "a list": ["a"],
    "a mapping": {"a": 1},
    "an empty text": "",
}
"""What a dataset column may hold by mistake, by what it is."""


_TEXTS = ("query", "good", "bad")


@dataclass(frozen=True)
class Pair:
    """A query with an answer that a person prefers to another."""

    query: str
    good: str
    bad: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Dataset columns of this row."""


def read_pairs(path: Path) -> list[Pair]:
    """Read pairs from a JSONL file: `query`, `good`, `bad` per line; other keys are columns.

    Raises:
        InputError: the file cannot be read, or a line is no such object.
    """
    try:
        lines = read_text(path, DATA_BYTES).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error)
        raise InputError(f"cannot read the pairs in {path} ({why}); correct the path") from error
    pairs = [
        _pair(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not pairs:
        raise InputError(f"{path} holds no pair; write one JSON object per line")
    return pairs


def _pair(line: str, place: str) -> Pair:
    try:
        row = json_text.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is not JSON ({error}); correct the line") from error
    texts = [row.get(key) for key in _TEXTS] if isinstance(row, dict) else []
    if len(texts) != len(_TEXTS) or not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"{place} has no texts 'query', 'good' and 'bad'; write all three in each line"
        )
    columns = {key: value for key, value in row.items() if key not in _TEXTS}
    return Pair(row["query"], row["good"], row["bad"], columns)


def make_group(
    query: str, columns: Mapping[str, Any], texts: Sequence[str], conversational: bool = True
) -> Group:
    """Completions of one query, with token ids that depend on their words alone."""
    messages = ({"role": "user", "content": query},)
    completions = []
    for text in texts:
        ids = (*(sum(map(ord, word)) for word in text.split()), 2)
        completions.append(Completion(ids, (0.0,) * len(ids), text, True))
    return Group(Query(messages, columns, 0, conversational), tuple(completions))
