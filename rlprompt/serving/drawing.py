"""An answer on its way to a client, whole or as a stream; and when the client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rlprompt.serving.chat_answers import Reply, event, openai_error
from rlprompt.serving.chat_requests import (
    ChatRequest,
    RequestLimits,
    parse_chat,
    parse_response,
)
from rlprompt.serving.json_api import Refusal
from rlprompt.serving.request_log import RequestRecord
from rlprompt.serving.scheduler import Event, Failure, Job, Piece


@dataclass(frozen=True)
class Form:
    """How an endpoint reads requests and writes answers."""

    parse: Callable[[Any, RequestLimits], ChatRequest]
    whole: Callable[[Reply], Any]
    """The answer in one."""
    start: Callable[[Reply], Iterator[bytes]]
    """The first events of a stream."""
    piece: Callable[[Reply, Piece], Iterator[bytes]]
    end: Callable[[Reply], Iterator[bytes]]


CHAT = Form(parse_chat, Reply.chat, Reply.chat_start, Reply.chat_piece, Reply.chat_end)
RESPONSE = Form(
    parse_response,
    Reply.response,
    Reply.response_start,
    Reply.response_piece,
    Reply.response_end,
)


@dataclass(eq=False)
class Drawing:
    """An answer that is being drawn, and the client who waits for it."""

    job: Job
    reply: Reply
    events: asyncio.Queue[Event]
    receive: Receive
    """What says that the client has gone."""
    ended: Callable[[Drawing], None]
    """Called once, when the answer is whole or nobody wants it."""
    record: RequestRecord
    tokens: list[list[int]] = field(default_factory=list)
    """Of each answer."""

    def __post_init__(self) -> None:
        """Listen to the client."""
        self.tokens = [[] for _ in self.reply.choices]
        self._gone = asyncio.ensure_future(self._left())

    async def first(self) -> Piece:
        """The first piece.

        Raises:
            Refusal: there is none.
        """
        try:
            piece = await self.next()
        except BaseException:
            self.stop()
            raise
        self.record.told_first()
        return piece

    async def next(self) -> Piece:
        """The next piece.

        Raises:
            Refusal: there is none, as the request has failed or its client has gone.
        """
        if self.events.empty():
            getter = asyncio.ensure_future(self.events.get())
            try:
                await asyncio.wait({getter, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not getter.done():
                    getter.cancel()
            if not getter.done() or getter.cancelled():
                self.record.metrics.add("rlprompt_cancelled_requests_total")
                raise Refusal(499, "the client has gone")
            got = getter.result()
        else:
            got = self.events.get_nowait()
        if isinstance(got, Failure):
            headers = {"Retry-After": "5"} if got.status in (429, 503) else {}
            raise Refusal(
                got.status, got.sentence, {**headers, **self.reply.headers}, code=got.code
            )
        return got

    def take(self, piece: Piece) -> None:
        """Take up a piece of a whole answer."""
        self.note(piece)
        self.reply.take(piece)

    def note(self, piece: Piece) -> None:
        """Remember a token."""
        self.tokens[piece.copy].append(piece.token.token_id)

    async def rest(self) -> None:
        """Take up all other pieces."""
        try:
            while not self.reply.is_whole:
                self.take(await self.next())
        finally:
            self.stop()

    def stop(self) -> None:
        """End it: what is not drawn by now nobody wants."""
        self._gone.cancel()
        self.ended(self)

    async def _left(self) -> None:
        """Returns when the client has gone."""
        while (await self.receive())["type"] != "http.disconnect":
            pass


class EventStream(Response):
    """A stream of server-sent events."""

    def __init__(self, drawing: Drawing, form: Form, first: Piece) -> None:
        """Begin with a piece.

        Args:
            drawing: the answer.
            form: how it is written.
            first: its first piece.
        """
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **drawing.reply.headers}
        headers |= drawing.record.headers
        super().__init__(None, 200, headers, "text/event-stream")
        del self.headers["content-length"]
        self._drawing, self._form, self._first = drawing, form, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events while they come."""
        drawing, form = self._drawing, self._form
        reply = drawing.reply
        status, code = 200, None
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            await _send(send, [*form.start(reply), *self._piece(self._first)])
            while not reply.is_whole:
                piece = await drawing.next()
                parts = [*self._piece(piece)]
                while not drawing.events.empty() and not reply.is_whole:
                    parts += self._piece(await drawing.next())
                await _send(send, parts)
            await _send(send, list(form.end(reply)))
        except Refusal as refusal:  # the status line has been sent: the error is an event
            status, code = refusal.status, refusal.code
            if refusal.status != 499:
                await _send(send, [event(openai_error(refusal))])
        finally:
            drawing.stop()
            drawing.record.end(status, code)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _piece(self, piece: Piece) -> Iterator[bytes]:
        self._drawing.note(piece)
        return self._form.piece(self._drawing.reply, piece)


async def _send(send: Send, parts: list[bytes]) -> None:
    if parts:
        await send({"type": "http.response.body", "body": b"".join(parts), "more_body": True})
