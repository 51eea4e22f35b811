"""Reward: the completion has a format that a program can read."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, model_validator

from rlprompt.errors import InputError
from rlprompt.rewards.base import Example
from rlprompt.rewards.rules.text import message_texts
from rlprompt.settings import Settings


class Format(Settings):
    """Full match of a pattern (1 or 0), or valid JSON (graded); in [0, 1].

    JSON: 0 when it cannot be parsed or its root is of the wrong kind; otherwise 0.5 + 0.5 * (share
    of `required_keys` that hold something), so 1.0 when no key is required. A key whose value is
    null, "", [] or {} does not count, because empty values are the cheapest way to have every key.
    White space around the completion is ignored.
    """

    kind: Literal["regex", "json"]
    """What is checked."""
    pattern: str | None = None
    """Python regular expression that the whole text must match; `(?s)` lets `.` match newlines."""
    required_keys: list[str] = Field(default_factory=list)
    """Keys that a JSON object must have."""
    root: Literal["object", "array", "any"] = "object"
    """Kind of JSON value at the root; `any` also accepts a bare number or string."""
    allow_fence: bool = False
    """Also read JSON inside one Markdown code fence that is the whole completion."""
    max_characters: int = Field(default=20_000, gt=0)
    """A longer completion gets 0: it bounds the work of a pattern that backtracks."""

    @model_validator(mode="after")
    def _check_kind(self) -> Format:
        if (self.kind == "regex") != (self.pattern is not None):
            raise InputError("pattern belongs to kind: regex and is needed there; set one of them")
        if self.required_keys and (self.kind == "regex" or self.root != "object"):
            raise InputError("required_keys need kind: json with root: object; change the kind")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise InputError(f"pattern {self.pattern!r} is not valid: {error}") from error
        return self

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern or "")

    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """One value in [0, 1] per completion."""
        return [self._value(text.strip()) for text in message_texts(completions)]

    def _value(self, text: str) -> float:
        if not text or len(text) > self.max_characters:
            return 0.0
        if self.kind == "regex":
            return float(self._compiled.fullmatch(text) is not None)
        return self._json_value(text)

    def _json_value(self, text: str) -> float:
        fenced = re.fullmatch(r"```(?:json)?\n(.*)\n```", text, re.DOTALL)
        if self.allow_fence and fenced:
            text = fenced.group(1)
        try:
            parsed = json.loads(text, parse_constant=_reject_constant)
        except (ValueError, RecursionError):
            return 0.0
        if self.root != "any" and not isinstance(parsed, dict if self.root == "object" else list):
            return 0.0
        if not self.required_keys:
            return 1.0
        filled = sum(parsed.get(key) not in (None, "", [], {}) for key in self.required_keys)
        return 0.5 + 0.5 * filled / len(self.required_keys)


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")  # Python's parser accepts NaN and Infinity


_QUERY = "Give the capital of Peru as JSON with city and country."
_JSON = {"kind": "json", "required_keys": ["city", "country"]}
_ASK = "Answer with yes or no: is fire hot?"
_YES = {"kind": "regex", "pattern": "(yes|no)[.]?"}
EXAMPLES = [
    Example(_QUERY, '{"city": "Lima", "country": "Peru"}', True, 1.0, options=_JSON),
    Example(_QUERY, '{"city": "Lima"}', False, 0.75, 0.75, options=_JSON),
    Example(_QUERY, '{"city": "", "country": null}', False, 0.5, 0.5, options=_JSON),
    Example(_QUERY, '["city", "country"]', False, high=0.0, options=_JSON),
    Example(_QUERY, 'Sure! {"city": "Lima", "country": "Peru"}', False, high=0.0, options=_JSON),
    Example(_QUERY, "[" * 5000, False, high=0.0, options=_JSON),
    Example(_QUERY, "", False, high=0.0, options=_JSON),
    Example(_ASK, "yes", True, 1.0, options=_YES),
    Example(_ASK, "yes, fire is hot", False, high=0.0, options=_YES),
    Example(_ASK, "", False, high=0.0, options=_YES),
]
