"""JSON that a schema accepts. Copy this file, change it, name yours in a recipe.

    rewards:
      - path: ../reward_models/task/json_schema.py:reward
        options: {schema: {type: object, required: [city], properties: {city: {type: string}}}}

    value = 1.0 when the schema accepts the answer, 0.2 + 0.6 / (1 + errors) when it is JSON that
            the schema refuses, 0.1 when JSON stands inside other text, else 0       in [0, 1]

A dataset column `schema` gives a schema per row (a mapping, or its JSON text) and goes before the
option. Checked with the package jsonschema (`pip install 'rlprompt[rules]'`). References to other
documents are not followed.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from rlprompt.errors import InputError
from rlprompt.rewards import Example
from rlprompt.rewards.rules.text import message_texts

REQUIRES = "jsonschema"
MAX_CHARACTERS = 20_000
_INSIDE = re.compile(r"\{[^{}]{1,2000}\}")


def reward(completions: list[Any], schema: Any = None, **kwargs: Any) -> list[float | None]:
    """One value in [0, 1] per completion, None where the row has no schema."""
    schemas = schema if isinstance(schema, list) else [schema] * len(completions)
    if schema is None:
        raise InputError("no schema is given; set the option schema, or add a column 'schema'")
    rows = zip(message_texts(completions), schemas, strict=True)
    return [None if each is None else score(text, _text_of(each)) for text, each in rows]


def score(text: str, schema: str) -> float:
    """The value of one completion for a schema in JSON."""
    validator = _validator(schema)
    text = text.strip()
    if not text or len(text) > MAX_CHARACTERS:
        return 0.0
    value = _parse(text)
    if value is _BROKEN:
        inside = any(_parse(each) is not _BROKEN for each in _INSIDE.findall(text)[:20])
        return 0.1 if inside else 0.0
    try:
        errors = sum(1 for _ in validator.iter_errors(value))
    except RecursionError:
        return 0.0
    return 1.0 if errors == 0 else 0.2 + 0.6 / (1 + errors)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _BROKEN


def _text_of(schema: Any) -> str:
    if isinstance(schema, Mapping):
        return json.dumps(schema)
    if isinstance(schema, str):
        return schema
    raise InputError(f"a schema is a mapping or JSON text, not {schema!r}; correct the row")


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    try:
        import jsonschema
    except ImportError as error:
        raise InputError(
            "json_schema needs the package jsonschema; run `pip install 'rlprompt[rules]'`"
        ) from error
    plain = _parse(schema)
    if not isinstance(plain, dict):
        raise InputError(f"the schema {schema[:60]!r} is no JSON object; correct it")
    try:
        jsonschema.Draft202012Validator.check_schema(plain)
    except jsonschema.SchemaError as error:
        raise InputError(f"the schema is wrong: {error.message}; correct it") from error
    return jsonschema.Draft202012Validator(plain)


_BROKEN = object()
_QUERY = "Give the capital of Peru as JSON with city and people."
_OPTIONS = {
    "schema": {
        "type": "object",
        "required": ["city", "people"],
        "properties": {"city": {"type": "string", "minLength": 1}, "people": {"type": "integer"}},
        "additionalProperties": False,
    }
}
EXAMPLES = [
    Example(_QUERY, '{"city": "Lima", "people": 10092000}', True, 1.0, options=_OPTIONS),
    Example(_QUERY, '{"city": "Lima"}', False, 0.5, 0.5, options=_OPTIONS),
    Example(_QUERY, '{"city": "", "people": "many", "x": 1}', False, 0.35, 0.35, options=_OPTIONS),
    Example(_QUERY, 'Sure: {"city": "Lima", "people": 1}', False, 0.1, 0.1, options=_OPTIONS),
    Example(_QUERY, "[[[[", False, high=0.0, options=_OPTIONS),
    Example(_QUERY, "", False, high=0.0, options=_OPTIONS),
]
