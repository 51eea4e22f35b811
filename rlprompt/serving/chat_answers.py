"""Answers in the form of OpenAI's API: chat completions, responses, and their streams."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlprompt.engines.continuous import Token
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.serving.chat_requests import ChatRequest
from rlprompt.serving.json_api import Refusal
from rlprompt.serving.scheduler import Piece

Decode = Callable[[Sequence[int]], str]
"""Text of token ids."""


def openai_error(refusal: Refusal) -> dict[str, Any]:
    """The body of an answer to a request that is not served, as OpenAI's clients read it.

    Args:
        refusal: why it is not served.
    """
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": refusal.sentence,
            "type": kinds.get(refusal.status, kind),
            "param": refusal.param,
            "code": refusal.code,
        }
    }


@dataclass
class Choice:
    """One answer as it grows."""

    text: str = ""
    finish: str | None = None
    num_tokens: int = 0
    logprobs: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Reply:
    """All that one request is answered with."""

    request: ChatRequest
    model: str
    """As it is told to the client."""
    prompt_hash: str
    """Of the prompt that it is drawn under."""
    prompt_tokens: int
    """Of the conversation and its prompt."""
    decode: Decode
    sampling: SamplingSettings
    """How it is drawn, once what the client leaves open is known."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    choices: list[Choice] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with answers without text."""
        self.choices = [Choice() for _ in range(self.request.copies)]

    @property
    def is_whole(self) -> bool:
        """Whether all answers have ended."""
        return all(choice.finish is not None for choice in self.choices)

    @property
    def headers(self) -> dict[str, str]:
        """What every answer says of its prompt."""
        return {"x-rlprompt-prompt": self.prompt_hash}

    def take(self, piece: Piece) -> list[dict[str, Any]]:
        """Take up what a step has added; returns what it tells of log-probabilities.

        Args:
            piece: what was added.
        """
        choice = self.choices[piece.copy]
        choice.text += piece.text
        choice.num_tokens += 1
        choice.finish = piece.finish
        token = piece.token
        ends = token.finish == "stop"
        told = [] if token.logprob is None or ends else [_token_entry(token, self.decode)]
        choice.logprobs += told
        return told

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens, as chat completions tell them."""
        drawn = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": self.prompt_tokens + drawn,
        }

    # Chat completions.

    def chat(self) -> dict[str, Any]:
        """The whole answer."""
        return {
            **self._chat_head("chat.completion"),
            "choices": [
                {
                    "index": place,
                    "message": {
                        "role": "assistant",
                        "content": choice.text,
                        "refusal": None,
                        "annotations": [],
                    },
                    "logprobs": self._logprobs(choice.logprobs),
                    "finish_reason": choice.finish,
                }
                for place, choice in enumerate(self.choices)
            ],
            "usage": self.usage(),
        }

    def chat_start(self) -> Iterator[bytes]:
        """The first events of a stream."""
        for place in range(len(self.choices)):
            yield self._chunk(place, {"role": "assistant", "content": ""}, None, None)

    def chat_piece(self, piece: Piece) -> Iterator[bytes]:
        """The events of a step."""
        told = self.take(piece)
        if piece.text or told:
            yield self._chunk(piece.copy, {"content": piece.text}, told, None)
        if piece.finish is not None:
            yield self._chunk(piece.copy, {}, None, piece.finish)

    def chat_end(self) -> Iterator[bytes]:
        """The last events of a stream."""
        if self.request.include_usage:
            head = self._chat_head("chat.completion.chunk")
            yield event({**head, "choices": [], "usage": self.usage()})
        yield b"data: [DONE]\n\n"

    def _chunk(
        self,
        place: int,
        delta: Mapping[str, Any],
        told: list[dict[str, Any]] | None,
        finish: str | None,
    ) -> bytes:
        choice = {
            "index": place,
            "delta": delta,
            "logprobs": None if told is None else self._logprobs(told),
            "finish_reason": finish,
        }
        chunk = {**self._chat_head("chat.completion.chunk"), "choices": [choice]}
        if self.request.include_usage:
            chunk["usage"] = None
        return event(chunk)

    def _chat_head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.prompt_hash,
        }

    def _logprobs(self, told: list[dict[str, Any]]) -> dict[str, Any] | None:
        if self.request.top_logprobs is None:
            return None
        return {"content": told, "refusal": None}

    # Responses.

    def response(self, status: str | None = None) -> dict[str, Any]:
        """The answer as a response.

        Args:
            status: its status; None = that of the end.
        """
        (choice,) = self.choices
        cut = choice.finish == "length"
        usage = self.usage()
        wanted = self.request.answer_format
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status is None and not cut else None,
            "status": status or ("incomplete" if cut else "completed"),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": self.request.echoed.get("instructions"),
            "max_output_tokens": self.request.max_tokens,
            "model": self.model,
            "output": [self._item(choice)] if status is None else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self.sampling.temperature,
            "text": {"format": {"type": "text"} if wanted is None else dict(wanted.told)},
            "tool_choice": "auto",
            "tools": [],
            "top_p": self.sampling.top_p,
            "top_logprobs": 0,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "max_tool_calls": None,
            "background": False,
            "service_tier": "default",
            "safety_identifier": None,
            "prompt_cache_key": None,
            "truncation": "disabled",
            "metadata": dict(self.request.echoed.get("metadata") or {}),
            "system_fingerprint": self.prompt_hash,
            "usage": None
            if status is not None
            else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }

    def response_start(self) -> Iterator[bytes]:
        """The first events of a response's stream."""
        for kind in ("response.created", "response.in_progress"):
            yield self._told(kind, response=self.response("in_progress"))
        item = {**self._item(Choice()), "status": "in_progress", "content": []}
        yield self._told("response.output_item.added", output_index=0, item=item)
        yield self._told("response.content_part.added", **self._place(), part=_part(""))

    def response_piece(self, piece: Piece) -> Iterator[bytes]:
        """The events of a step."""
        self.take(piece)
        if piece.text:
            yield self._told(
                "response.output_text.delta", **self._place(), delta=piece.text, logprobs=[]
            )

    def response_end(self) -> Iterator[bytes]:
        """The last events of a response's stream."""
        (choice,) = self.choices
        text = choice.text
        yield self._told("response.output_text.done", **self._place(), text=text, logprobs=[])
        yield self._told("response.content_part.done", **self._place(), part=_part(text))
        yield self._told("response.output_item.done", output_index=0, item=self._item(choice))
        whole = self.response()
        yield self._told(f"response.{whole['status']}", response=whole)

    def _item(self, choice: Choice) -> dict[str, Any]:
        return {
            "id": f"msg_{self.id}",
            "type": "message",
            "role": "assistant",
            "status": "incomplete" if choice.finish == "length" else "completed",
            "content": [_part(choice.text)],
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self.id}", "output_index": 0, "content_index": 0}

    _number = 0

    def _told(self, kind: str, **content: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._number, **content}
        self._number += 1
        return f"event: {kind}\n".encode() + event(body)


def event(body: Any) -> bytes:
    """A server-sent event.

    Args:
        body: value of JSON.
    """
    return b"data: " + json.dumps(body, allow_nan=False).encode() + b"\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _token_entry(token: Token, decode: Decode) -> dict[str, Any]:
    top = [_entry(token_id, logprob, decode) for token_id, logprob in token.top]
    return {**_entry(token.token_id, token.logprob or 0.0, decode), "top_logprobs": top}


def _entry(token_id: int, logprob: float, decode: Decode) -> dict[str, Any]:
    text = decode([token_id])
    # JSON has no minus infinity, which OpenAI writes so.
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}
