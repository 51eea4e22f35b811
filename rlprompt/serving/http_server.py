"""An HTTP server for applications that answer JSON: uvicorn, and what it leaves to a proxy.

uvicorn and h11 read and write HTTP. Added is what a server needs that nobody stands before:

- deadlines for a request's head, for its body, and for a client that does not take its answer,
  each for the whole and not per read: one byte every ten seconds gains nothing;
- places for connections that idle clients cannot keep (`serving.connections`), TLS handshakes
  included;
- a request whose length can be read in two ways is refused: two Content-Length headers or values,
  or one beside Transfer-Encoding, and header lines that are folded (RFC 9112, sections 5.2 and
  6.3);
- what is no HTTP is answered in JSON too.

An application is any ASGI callable; `serving.json_api` helps to write one.
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import ssl
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from rlprompt.errors import InputError
from rlprompt.serving.connections import LimitedListener

_HEAD_BYTES = 32_768
_LENGTHS = re.compile(rb"(?im)^content-length[ \t]*:([^\r\n]*)")
_CODINGS = re.compile(rb"(?im)^transfer-encoding[ \t]*:")
_FOLDED = re.compile(rb"\n[ \t]")
_HEAD_END = re.compile(rb"\n\r?\n")


@dataclass(frozen=True)
class Limits:
    """What clients may cost: seconds and places."""

    head_seconds: float = 10.0
    """From the connection, or the first byte of a later request, to the end of the headers."""
    body_seconds: float = 60.0
    """From the end of the headers to the end of the body."""
    answer_seconds: float = 60.0
    """That a client may take to read what is ready for it."""
    idle_seconds: int = 30
    """That a connection is kept between two requests."""
    stop_seconds: int = 5
    """That requests in progress may take when the server stops."""
    connections: int = 512
    """Open at a time; at most half of the process's file descriptors."""
    connections_per_address: int = 256
    """Of one IPv4 address or one /64 network of IPv6."""


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str = "127.0.0.1"
    port: int = 0
    """0 = any free one."""
    certificate: Path | None = None
    """PEM file with certificate and key; None serves plain HTTP."""
    limits: Limits = field(default_factory=Limits)


class HttpServer:
    """Serves an ASGI application; the socket is bound when it is made.

    Args:
        app: the application, called for every request.
        address: the address, the certificate and the limits.

    Raises:
        InputError: the address cannot be used, or the certificate cannot be read.
    """

    def __init__(self, app: ASGIApp, address: Address) -> None:
        self._address = address
        self._tls = None if address.certificate is None else _tls(address.certificate)
        limits = address.limits
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Without a limit of the process the number is -1.
        total = min(limits.connections, descriptors // 2) if descriptors > 0 else limits.connections
        try:
            self._listener = LimitedListener(
                address.host,
                address.port,
                total=max(1, total),
                per_address=max(1, min(limits.connections_per_address, total - total // 4)),
            )
        except (OSError, OverflowError, ValueError) as error:
            raise InputError(
                f"cannot listen on {address.host}:{address.port} ({error}); choose another address"
            ) from error
        self._server = uvicorn.Server(_Config(app, self._listener, limits, self._tls))
        self._ended = threading.Event()
        self._ended.set()

    @property
    def server_address(self) -> tuple[str, int]:
        """The host as given, and the port that is listened on."""
        return self._address.host, int(self._listener.getsockname()[1])

    @property
    def origin(self) -> str:
        """Scheme, host and port, as they begin a URL."""
        host, port = self.server_address
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def serve_forever(self) -> None:
        """Serve until `shutdown`, which another thread or a signal handler calls."""
        self._ended.clear()
        try:
            seconds = self._address.limits.head_seconds
            with asyncio.Runner(loop_factory=lambda: _Loop(seconds)) as runner:
                runner.run(self._server.serve(sockets=[self._listener]))
        finally:
            self._ended.set()

    def shutdown(self) -> None:
        """Take no more connections, answer what is in progress, and wait for the end of that."""
        self._server.should_exit = True
        self._ended.wait()

    def close(self) -> None:
        """Free the address; twice is fine."""
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Loop(asyncio.SelectorEventLoop):
    """The event loop of a server: TLS handshakes have a deadline of ours, not of a minute."""

    def __init__(self, handshake_seconds: float) -> None:
        super().__init__()
        self._handshake_seconds = handshake_seconds

    async def create_server(self, *args: Any, ssl: Any = None, **options: Any) -> asyncio.Server:
        if ssl is not None:
            options["ssl_handshake_timeout"] = self._handshake_seconds
            options["ssl_shutdown_timeout"] = self._handshake_seconds
        return await super().create_server(*args, ssl=ssl, **options)


class _Config(uvicorn.Config):
    """uvicorn's settings, and what our protocol asks for beside them."""

    def __init__(
        self, app: ASGIApp, listener: LimitedListener, limits: Limits, tls: ssl.SSLContext | None
    ) -> None:
        self.listener, self.limits = listener, limits
        super().__init__(
            app,
            http=_Protocol,
            ws="none",
            loop="asyncio",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # a client's word on where it comes from
            server_header=False,
            headers=[("server", "rlprompt")],
            backlog=128,
            timeout_keep_alive=limits.idle_seconds,
            timeout_graceful_shutdown=limits.stop_seconds,
            ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        )


class _StrictConnection(h11.Connection):
    """h11's reader, which takes two equal Content-Length headers for one, as we do not."""

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE:
            waiting, _ = self.trailing_data
            head = _HEAD_END.search(waiting)
            if head is not None:
                _refuse_two_lengths(waiting[: head.end()])
        return super().next_event()


def _refuse_two_lengths(head: bytes) -> None:
    lengths = _LENGTHS.findall(head)
    if len(lengths) > 1 or any(b"," in each for each in lengths):
        raise h11.RemoteProtocolError("there are two values of Content-Length")
    if lengths and _CODINGS.search(head):
        raise h11.RemoteProtocolError("there are both Content-Length and Transfer-Encoding")
    if _FOLDED.search(head):
        raise h11.RemoteProtocolError("a header goes on in a second line")


class _Protocol(H11Protocol):
    """One connection: uvicorn's, with deadlines and errors in JSON."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, _Config)
        self._limits, self._listener = config.limits, config.listener
        self.conn = _StrictConnection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES)
        self._number = -1
        self._part: str | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._reader_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        taken = transport.get_extra_info("socket")
        self._number = -1 if taken is None else taken.fileno()
        self._expect("head")

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._deadline, self._reader_deadline):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is h11.SEND_BODY:
            self._expect("body")
        elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._expect("head")
        else:
            self._expect(None)
        answering = self.cycle is not None and not self.cycle.response_complete
        whole = self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)
        self._listener.mark(self._number, busy=answering and whole)

    def on_response_complete(self) -> None:
        self._listener.mark(self._number, busy=False)
        # What is not taken by then never is; closing a transport waits for that without end.
        if self.transport.get_write_buffer_size():
            self._await_reader()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader_deadline is not None:
            self._reader_deadline.cancel()
            self._reader_deadline = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or not unambiguous, and close."""
        error = sys.exception()
        status, reason = 400, msg
        if isinstance(error, h11.RemoteProtocolError):
            status, reason = error.error_status_hint, str(error)
        if self.cycle is not None:
            self.cycle.disconnected = True  # nothing more of the application's is sent
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            sentence = f"this is no HTTP request that can be read in one way: {reason}"
            body = json.dumps({"error": sentence}).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _should_upgrade(self) -> bool:
        return False  # an Upgrade header is a wish that may be ignored, not worth a warning

    def _expect(self, part: str | None) -> None:
        """Start the clock of a part of a request, unless it runs already."""
        if part == self._part:
            return
        self._part = part
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if part is not None:
            limits = self._limits
            seconds = limits.head_seconds if part == "head" else limits.body_seconds
            self._deadline = self.loop.call_later(seconds, self._expire, part)

    def _expire(self, part: str) -> None:
        """Tell a client that its time is over, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.flow.write_paused:
            seconds = self._limits.head_seconds if part == "head" else self._limits.body_seconds
            body = json.dumps({"error": f"the request's {part} took over {seconds:g} seconds"})
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\n"
                b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body.encode())
            )
        # What the kernel has not taken by now waits for a client that does not read.
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _await_reader(self) -> None:
        if self._reader_deadline is None:
            seconds = self._limits.answer_seconds
            self._reader_deadline = self.loop.call_later(seconds, self._drop_if_unread)

    def _drop_if_unread(self) -> None:
        self._reader_deadline = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()


def _tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password is asked for at the terminal unless there is one, and a service has none.
        context.load_cert_chain(certificate, password="")
    except (OSError, ValueError) as error:
        raise InputError(
            f"certificate {str(certificate)!r} cannot be read ({error}); give a PEM file with "
            f"certificate and key, the key without a password"
        ) from error
    return context
