"""What is asked of an endpoint, and what it answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

_TURN_TOKENS = 16
"""Tokens that a chat template writes around one turn, at most."""


@dataclass(frozen=True)
class Question:
    """One request, of which equal ones are paid for once."""

    body: Mapping[str, Any]
    """What is sent: model, messages, sampling, seed, and the number of choices as `n` above 1."""
    draw: str
    """What tells apart requests that are to be drawn anew, such as seed, query and number."""
    max_tokens: int
    """Longest completion."""
    choices: int = 1
    """Completions that are wanted."""

    @cached_property
    def key(self) -> str:
        """Hash over all of it: the name of its answer in the journal."""
        asked = {"body": self.body, "draw": self.draw}
        text = json.dumps(asked, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def text_bytes(self) -> int:
        """Most tokens of its texts: no tokenizer in use makes more of a text than its bytes."""
        messages = self.body["messages"]
        texts = (str(each["content"]).encode("utf-8", "replace") for each in messages)
        return sum(len(text) + _TURN_TOKENS for text in texts)


@dataclass(frozen=True)
class Usage:
    """Tokens that were paid for."""

    prompt: int
    completion: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Choice:
    """One completion."""

    text: str
    finish: str
    """Why it ended, as the server says: `stop`, `length`, ...; empty where it does not say."""
    tokens: int | None
    """Its tokens as the server counts them; None where it does not."""


@dataclass(frozen=True)
class Answer:
    """What came of a question."""

    choices: tuple[Choice, ...]
    usage: Usage | None
    """None where the server does not say."""

    def plain(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Answer:
        """What `plain` gave.

        Raises:
            KeyError, TypeError: it is something else.
        """
        usage = plain["usage"]
        return cls(
            tuple(Choice(**each) for each in plain["choices"]),
            None if usage is None else Usage(**usage),
        )


class UnusableError(ValueError):
    """An answer that holds no completions."""


def read_answer(said: Any, question: Question) -> Answer:
    """The completions in a server's answer.

    Args:
        said: the JSON value that came.
        question: what was asked.

    Raises:
        UnusableError: it holds no completions, or not as many as were asked for.
    """
    usage = read_usage(said)
    given = said.get("choices") if isinstance(said, dict) else None
    if not isinstance(given, list) or not given:
        raise UnusableError("an answer without choices")
    if len(given) != question.choices:
        raise UnusableError(f"{len(given)} choices for {question.choices} that were asked for")
    ordered = sorted(given, key=_index)
    alone = usage.completion if usage is not None and len(given) == 1 else None
    return Answer(tuple(_choice(each, alone) for each in ordered), usage)


def read_usage(said: Any) -> Usage | None:
    """The tokens that an answer says were used; None where it says none that can be."""
    usage = said.get("usage") if isinstance(said, dict) else None
    if not isinstance(usage, dict):
        return None
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    numbers = [n for n in counts if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
    return Usage(*numbers) if len(numbers) == len(counts) else None


def _index(choice: Any) -> int:
    index = choice.get("index") if isinstance(choice, dict) else None
    return index if isinstance(index, int) else 0


def _choice(given: Any, tokens: int | None) -> Choice:
    message = given.get("message") if isinstance(given, dict) else None
    if not isinstance(message, dict):
        raise UnusableError("a choice without a message")
    text = message.get("content")
    if text is None:  # a model that declines may say so beside the content, or says nothing
        text = message.get("refusal") or ""
    if isinstance(text, list):  # parts, as some servers give them
        text = "".join(str(p.get("text", "")) for p in text if isinstance(p, dict))
    if not isinstance(text, str):
        raise UnusableError("a message whose content is no text")
    finish = given.get("finish_reason")
    if tokens is None:
        tokens = _counted(given.get("logprobs"))
    clean = text.encode("utf-8", "replace").decode()  # halves of surrogate pairs are no text
    return Choice(clean, finish if isinstance(finish, str) else "", tokens)


def _counted(logprobs: Any) -> int | None:
    """Tokens for which there is a log-probability."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    return len(content) if isinstance(content, list) else None
