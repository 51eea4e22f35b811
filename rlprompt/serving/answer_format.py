"""What form a client wants its answer in: text, any JSON object, or JSON of a schema."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rlprompt.engines.grammar import JsonGrammar, JsonGrammars
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.serving.json_api import Refusal

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MOST_WAITING = 16
"""Schemas that may wait to be read."""


@dataclass(frozen=True)
class AnswerFormat:
    """A form other than text."""

    schema: Mapping[str, Any]
    """JSON schema of the answer."""
    told: Mapping[str, Any]
    """The form, as a response repeats it."""
    param: str
    """The field of the request that asks for it."""


def chat_format(value: Any) -> AnswerFormat | None:
    """`response_format` of a chat completion; None = text.

    Args:
        value: the field; None = it is not there.

    Raises:
        Refusal: 400, it is no form that is known here.
    """
    where = "response_format"
    kind = _kind(value, where)
    if kind != "json_schema":
        return _without_schema(kind, value, where)
    _only(value, ("type", "json_schema"), where)
    return _schema(value.get("json_schema"), f"{where}.json_schema", ())


def response_format(value: Any) -> AnswerFormat | None:
    """`text` of a response, which holds the form; None = text.

    Args:
        value: the field; None = it is not there.

    Raises:
        Refusal: 400, it is no form that is known here.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _wrong("text", "is no object with format; correct it")
    _only(value, ("format",), "text")
    where = "text.format"
    kind = _kind(value.get("format"), where)
    if kind != "json_schema":
        return _without_schema(kind, value.get("format"), where)
    return _schema(value["format"], where, ("type",))


class Grammars:
    """Reads the schemas of requests, one after the other, beside the event loop."""

    def __init__(self, policy: Policy) -> None:
        """Begin without a schema.

        Args:
            policy: the policy over the base.
        """
        self._grammars = JsonGrammars(policy)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="rlprompt-grammar")
        self._waiting = 0

    async def of(self, wanted: AnswerFormat | None) -> JsonGrammar | None:
        """The grammar of a form; None = text.

        Args:
            wanted: the form.

        Raises:
            Refusal: 400, its schema cannot be used; 429, too many wait to be read.
        """
        if wanted is None:
            return None
        if self._waiting >= _MOST_WAITING:
            raise Refusal(
                429,
                f"{self._waiting} JSON schemas wait to be read, as many as may; ask again later",
                {"Retry-After": "5"},
                code="queue_full",
            )
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._reader, self._grammars.of, wanted.schema)
        except InputError as error:
            raise Refusal(400, str(error), param=wanted.param) from error
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End the thread; twice is fine."""
        self._reader.shutdown(cancel_futures=True)


def _kind(value: Any, where: str) -> str:
    if value is None:
        return "text"
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise _wrong(
            f"{where}.type", "is none of text, json_object, json_schema; choose one of them"
        )
    return str(kind)


def _without_schema(kind: str, value: Any, where: str) -> AnswerFormat | None:
    if value is not None:
        _only(value, ("type",), where)
    if kind == "text":
        return None
    return AnswerFormat({"type": "object"}, {"type": "json_object"}, where)


def _schema(value: Any, where: str, beside: tuple[str, ...]) -> AnswerFormat:
    """A schema with its name."""
    if not isinstance(value, dict):
        raise _wrong(where, "is no object with name and schema; send one")
    _only(value, (*beside, "name", "description", "schema", "strict"), where)
    name, description, strict = (value.get(key) for key in ("name", "description", "strict"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _wrong(f"{where}.name", "is no word of up to 64 letters, digits, _ and -; correct it")
    if not isinstance(value.get("schema"), dict):
        raise _wrong(f"{where}.schema", "is no JSON schema; send an object")
    if description is not None and not isinstance(description, str):
        raise _wrong(f"{where}.description", "is no text; send a string")
    if strict is not None and not isinstance(strict, bool):
        raise _wrong(f"{where}.strict", "is neither true nor false; correct it")
    told = {
        "type": "json_schema",
        "name": name,
        "description": description,
        "schema": value["schema"],
        "strict": bool(strict),
    }
    return AnswerFormat(value["schema"], told, f"{where}.schema")


def _only(value: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key, each in value.items():
        if key not in known and each is not None:
            shown = key if len(key) <= 40 else f"{key[:37]}..."
            raise _wrong(f"{where}.{shown}", "is not known here; leave it out")


def _wrong(param: str, what: str) -> Refusal:
    code = "unsupported_parameter" if "not known" in what else None
    return Refusal(400, f"{param} {what}", param=param, code=code)
