"""Requests in the form of OpenAI's API, as what is to be drawn.

A field that would change the answer and is not known here is refused: a client that asks for tools
must not get an answer that knows of none. What changes nothing (`user`, `metadata`, `store`) may
stand there.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlprompt.serving.answer_format import AnswerFormat, chat_format, response_format
from rlprompt.serving.json_api import Refusal
from rlprompt.types import Message

_MOST_STOPS, _LONGEST_STOP = 4, 256
_MOST_TOP = 20
_HARMLESS = frozenset(
    {
        "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "user", "background", "truncation", "include",
    }
)  # fmt: skip
"""Fields that change nothing of the answer."""
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "reasoning": ({},),
}
"""Fields that would change the answer, with the values that do not."""


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for."""

    tokens: int = 1024
    """Longest answer."""
    answers: int = 16
    """Most answers of one request."""


@dataclass(frozen=True)
class ChatRequest:
    """A request that was read and understood."""

    model: str
    """As the client names it."""
    messages: tuple[Message, ...]
    """Turns of user and assistant."""
    system: str | None
    """What the client puts into the system turn; None = no such message."""
    sampling: Mapping[str, Any]
    """The fields of `SamplingSettings` that the client gives."""
    max_tokens: int | None = None
    """Longest answer; None = as long as the server allows."""
    copies: int = 1
    """Answers."""
    stop: tuple[str, ...] = ()
    """Strings before which an answer ends."""
    top_logprobs: int | None = None
    """See `engines.continuous.Ask`."""
    seed: int = 0
    """Seed of the draws."""
    stream: bool = False
    """Whether the answer is told while it is drawn."""
    include_usage: bool = False
    """Whether a stream ends with the numbers of tokens."""
    user: str = ""
    """Whom the answer is for: who always gets the same version of an alias with shares."""
    answer_format: AnswerFormat | None = None
    """Form of the answer; None = text."""
    echoed: Mapping[str, Any] = field(default_factory=dict)
    """What the answer repeats."""


def parse_chat(body: Any, limits: RequestLimits) -> ChatRequest:
    """A body of `POST /v1/chat/completions`.

    Args:
        body: the parsed JSON.
        limits: what it may ask for.

    Raises:
        Refusal: 400, it asks for what is not there, or is none.
    """
    fields = _Fields(body)
    system, messages = _turns(fields.need("messages"))
    top = _top_logprobs(fields)
    stream = fields.boolean("stream")
    given = [fields.integer(key, 1, 2**31) for key in ("max_completion_tokens", "max_tokens")]
    if None not in given and given[0] != given[1]:
        raise _wrong("max_tokens", "differs from max_completion_tokens; give one of them")
    request = ChatRequest(
        model=fields.text("model"),
        messages=messages,
        system=system,
        sampling=_sampling(fields),
        max_tokens=_within(limits.tokens, given[0] if given[0] is not None else given[1]),
        copies=fields.integer("n", 1, limits.answers) or 1,
        stop=_stop(fields.take("stop")),
        top_logprobs=top,
        seed=_seed(fields),
        stream=stream,
        include_usage=_stream_options(fields, stream),
        user=_user(fields),
        answer_format=chat_format(fields.take("response_format")),
    )
    fields.end("chat completions")
    return request


def parse_response(body: Any, limits: RequestLimits) -> ChatRequest:
    """A body of `POST /v1/responses`.

    Args:
        body: the parsed JSON.
        limits: what it may ask for.

    Raises:
        Refusal: 400, it asks for what is not there, or is none.
    """
    fields = _Fields(body)
    given = fields.need("input")
    turns = [{"role": "user", "content": given}] if isinstance(given, str) else given
    instructions = fields.take("instructions")
    if instructions is not None and not isinstance(instructions, str):
        raise _wrong("instructions", "is no text; send a string")
    system, messages = _turns(turns, "input")
    if instructions is not None:
        system = instructions if system is None else f"{instructions}\n\n{system}"
    if fields.take("previous_response_id") is not None:
        raise _wrong(
            "previous_response_id", "names an answer, and none is kept here; send all turns"
        )
    request = ChatRequest(
        model=fields.text("model"),
        messages=messages,
        system=system,
        sampling=_sampling(fields),
        max_tokens=_within(limits.tokens, fields.integer("max_output_tokens", 1, 2**31)),
        seed=_seed(fields),
        stream=fields.boolean("stream"),
        include_usage=True,
        user=_user(fields),
        answer_format=response_format(fields.take("text")),
        echoed={"instructions": instructions, "metadata": _metadata(fields)},
    )
    fields.end("responses")
    return request


class _Fields:
    """The fields of a body, each taken once; null means that a field is not there."""

    def __init__(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise Refusal(400, "the body is no JSON object; send one")
        self._left = {key: value for key, value in body.items() if value is not None}

    def take(self, key: str) -> Any:
        return self._left.pop(key, None)

    def need(self, key: str) -> Any:
        if key not in self._left:
            raise _wrong(key, "is missing; send it")
        return self.take(key)

    def text(self, key: str) -> str:
        value = self.need(key)
        if not isinstance(value, str) or not value:
            raise _wrong(key, "is no text; send a string")
        return value

    def boolean(self, key: str) -> bool:
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            raise _wrong(key, "is neither true nor false; correct it")
        return bool(value)

    def integer(self, key: str, least: int, most: int) -> int | None:
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _wrong(key, f"is no whole number from {least} to {most}; correct it")
        return value

    def number(self, key: str, fits: Callable[[float], bool], told: str) -> float | None:
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not fits(value):
            raise _wrong(key, f"is no number {told}; correct it")
        return float(value)

    def end(self, what: str) -> None:
        """Refuse what is left and would have changed the answer."""
        for key, value in self._left.items():
            if key in _HARMLESS:
                continue
            if key not in _WITHOUT_EFFECT:
                raise _wrong(key, f"is not known for {what} here; leave it out")
            if value not in _WITHOUT_EFFECT[key]:
                raise _wrong(key, "is not supported here, and ignoring it would change the answer; "
                                  "leave it out")  # fmt: skip


def _wrong(param: str, what: str) -> Refusal:
    shown = param if len(param) <= 80 else f"{param[:77]}..."
    code = "unsupported_parameter" if "not supported" in what or "not known" in what else None
    return Refusal(400, f"{shown} {what}", param=shown, code=code)


def _sampling(fields: _Fields) -> dict[str, Any]:
    given = {
        "temperature": fields.number("temperature", lambda x: 0 <= x <= 2, "from 0 to 2"),
        "top_p": fields.number("top_p", lambda x: 0 < x <= 1, "above 0 and up to 1"),
        "min_p": fields.number("min_p", lambda x: 0 <= x < 1, "from 0 to below 1"),
        "top_k": fields.integer("top_k", 1, 2**31),
    }
    return {key: value for key, value in given.items() if value is not None}


def _within(most: int, asked: int | None) -> int | None:
    if asked is not None and asked > most:
        raise _wrong(
            "max_tokens", f"is {asked}, and answers here have at most {most}; ask for less"
        )
    return asked


def _top_logprobs(fields: _Fields) -> int | None:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, _MOST_TOP)
    if top is not None and not wanted:
        raise _wrong("top_logprobs", "has no effect without logprobs: true; set that too")
    return (top or 0) if wanted else None


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    fits = isinstance(strings, list) and len(strings) <= _MOST_STOPS
    if not fits or not all(isinstance(s, str) and 0 < len(s) <= _LONGEST_STOP for s in strings):
        raise _wrong(
            "stop",
            f"is neither a string nor a list of up to {_MOST_STOPS}, of 1 to {_LONGEST_STOP} "
            "characters each; correct it",
        )
    return tuple(strings)


def _seed(fields: _Fields) -> int:
    given = fields.integer("seed", -(2**63), 2**63 - 1)
    return secrets.randbits(31) if given is None else given % 2**63


def _user(fields: _Fields) -> str:
    value = fields.take("user")
    if value is not None and not isinstance(value, str):
        raise _wrong("user", "is no text; send a string")
    return value or ""


def _metadata(fields: _Fields) -> dict[str, Any]:
    value = fields.take("metadata")
    return value if isinstance(value, dict) else {}


def _stream_options(fields: _Fields, stream: bool) -> bool:
    options = fields.take("stream_options")
    if options is None:
        return False
    if not stream:
        raise _wrong("stream_options", "has no effect without stream: true; leave it out")
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise _wrong("stream_options", "is no object with include_usage; correct it")
    if not all(isinstance(value, bool) for value in options.values()):
        raise _wrong("stream_options", "holds something that is neither true nor false; correct it")
    return bool(options.get("include_usage"))


def _turns(value: Any, param: str = "messages") -> tuple[str | None, tuple[Message, ...]]:
    """The system text, and the turns of user and assistant."""
    if not isinstance(value, list) or not value:
        raise _wrong(param, "is no list of messages; send at least one")
    systems: list[str] = []
    turns: list[Message] = []
    for place, message in enumerate(value):
        where = f"{param}[{place}]"
        if not isinstance(message, dict):
            raise _wrong(where, "is no object with role and content; correct it")
        role, content = _role(message, where), _content(message.get("content"), f"{where}.content")
        if role == "system" and turns:
            raise _wrong(where, "is a system message behind others; put it first")
        if role == "system":
            systems.append(content)
        else:
            turns.append({"role": role, "content": content})
    return "\n\n".join(systems) if systems else None, tuple(turns)


def _role(message: Mapping[str, Any], where: str) -> str:
    role = message.get("role")
    if message.get("type") not in (None, "message"):
        raise _wrong(f"{where}.type", "is not message, and nothing else is known; correct it")
    known = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
    if not isinstance(role, str) or role not in known:
        raise _wrong(f"{where}.role", "is none of system, developer, user, assistant; correct it")
    ours = {"role", "content", "type", "id", "status"}
    extra = [key for key, each in message.items() if key not in ours and each not in (None, [], {})]
    if extra:
        raise _wrong(f"{where}.{extra[0]}", "is not supported here; leave it out")
    return known[role]


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not value:
        raise _wrong(where, "is neither a text nor a list of texts; correct it")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise _wrong(where, "holds a part that is no text, and nothing else can be read here")
        texts.append(text)
    return "".join(texts)
