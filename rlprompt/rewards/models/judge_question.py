"""What a judge is asked, wherever it runs.

The answer stands between marks that hold its own hash, so that it cannot close them and speak as
us: no text can contain its own SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

ASK = "Question:\n{query}\n\nAnswer, between the marks:\n{completion}\n\n{choice}"


def ask_text(query: str, completion: str, verdicts: Sequence[str]) -> str:
    """The user message for a judge that must choose one of `verdicts`."""
    mark = hashlib.sha256(completion.encode(errors="replace")).hexdigest()[:8]
    fenced = f"[answer {mark}]\n{completion}\n[end of answer {mark}]"
    choice = f"Reply with one word: {' or '.join(verdicts)}."
    return ASK.format(query=query, completion=fenced, choice=choice)


def check_verdicts(verdicts: Iterable[str]) -> None:
    """Refuse verdicts among which no judge could choose.

    Raises:
        ValueError: there are fewer than two, one is empty, or two differ in case only.
    """
    words = [word.strip().casefold() for word in verdicts]
    if len(words) < 2 or len(set(words)) < len(words) or not all(words):
        raise ValueError("give at least two verdicts that differ in more than their case")
