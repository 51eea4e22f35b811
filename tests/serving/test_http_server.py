"""The HTTP server under clients that are slow, many, ambiguous or broken, over raw sockets."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from rlprompt.errors import InputError
from rlprompt.serving.connections import LimitedListener, network_of
from rlprompt.serving.http_server import Address, HttpServer, Limits
from rlprompt.serving.json_api import (
    BearerToken,
    Endpoint,
    Refusal,
    answer,
    json_app,
    parse_json,
    read_json,
)

TOKEN = "s3cret"
MAX_BODY = 100_000


async def echo(request: Request) -> Response:
    BearerToken(TOKEN).check(request)
    return answer(await read_json(request, MAX_BODY))


async def large(request: Request) -> Response:
    return Response(b"x" * 50_000_000)


async def broken(request: Request) -> Response:
    raise RuntimeError(f"of {TOKEN}")


async def half(request: Request) -> Response:
    async def parts() -> Any:
        yield b"one"
        raise RuntimeError("no second")

    return StreamingResponse(parts())


APP = json_app(
    [
        Endpoint("POST", "/echo", echo),
        Endpoint("GET", "/large", large),
        Endpoint("GET", "/broken", broken),
        Endpoint("GET", "/half", half),
    ]
)


@contextmanager
def serving(certificate: Path | None = None, **limits: Any) -> Iterator[HttpServer]:
    with HttpServer(APP, Address(certificate=certificate, limits=Limits(**limits))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with serving() as one:
        yield one


def connect(server: HttpServer, seconds: float = 10.0) -> socket.socket:
    return socket.create_connection(server.server_address, timeout=seconds)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionError:
            return received
        if not part:
            return received
        received += part


def raw(server: HttpServer, data: bytes) -> tuple[int, Any, bytes]:
    """Status, JSON body and head of the answer to raw bytes, read until the server closes."""
    with connect(server) as connection:
        connection.sendall(data)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower(), head
    return int(head.split()[1]), json.loads(body) if body else None, head


def ask(
    server: HttpServer,
    body: bytes = b"{}",
    *,
    start: str = "POST /echo HTTP/1.1",
    headers: str = "",
    token: str | None = TOKEN,
    length: str | None = None,
) -> tuple[int, Any, bytes]:
    """A request in whatever form; the client wants no second one."""
    lines = [start, "Host: x", "Connection: close"]
    lines += [] if token is None else [f"Authorization: Bearer {token}"]
    lines += [f"Content-Length: {len(body) if length is None else length}"]
    lines += [headers] if headers else []
    return raw(server, "\r\n".join([*lines, "", ""]).encode("latin-1") + body)


def test_what_json_holds_comes_back(server: HttpServer, caplog: pytest.LogCaptureFixture) -> None:
    assert ask(server, b'{"a": [1, 2.5, null, "\\u00e9"]}')[:2] == (
        200,
        {"a": [1, 2.5, None, "é"]},
    )
    chunked = (
        "POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Authorization: bearer {TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n"
        "2\r\n[1\r\n3\r\n,2]\r\n0\r\n\r\n"
    )
    assert raw(server, chunked.encode())[:2] == (200, [1, 2])
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ("Content-Length: 2", b"{}"),
        ("content-length : 2", b"{}"),
        ("Content-Length: 40", b"{}GET /large HTTP/1.1"),
        ("Transfer-Encoding: chunked", b"0\r\n\r\nGET /large HTTP/1.1\r\n\r\n"),
        ("transfer-encoding:chunked", b"2\r\n{}\r\n0\r\n\r\n"),
        ("Transfer-Encoding: gzip, chunked", b"{}"),
        ("Transfer-Encoding: identity", b"{}"),
        ("X: y\r\n Content-Length: 7", b"{}"),
    ],
)
def test_a_length_that_can_be_read_in_two_ways_is_refused(
    server: HttpServer, headers: str, body: bytes
) -> None:
    status, told, head = ask(server, body, headers=headers, length="2")
    assert status in (400, 501)
    assert "no HTTP request that can be read in one way" in told["error"]
    assert head.count(b"HTTP/1.1") == 1, "the bytes behind it were taken for a request"
    assert ask(server)[0] == 200


@pytest.mark.parametrize(
    "length", ["-1", "+2", "1e3", "0x10", "2, 2", "2,3", "", " ", "\xb2", "9" * 5000, "2 2"]
)
def test_a_length_that_is_no_number_is_refused(server: HttpServer, length: str) -> None:
    assert ask(server, length=length)[0] == 400


def test_an_ambiguous_second_request_of_a_connection_is_refused(server: HttpServer) -> None:
    first = f"POST /echo HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    both = (
        f"{first}Content-Length: 2\r\n\r\n[]{first}Content-Length: 2\r\nContent-Length: 2\r\n\r\n[]"
    )
    with connect(server) as connection:
        connection.sendall(both.encode())
        received = read_all(connection)
    assert received.count(b"HTTP/1.1 200") == 1
    assert received.count(b"HTTP/1.1 400") == 1


@pytest.mark.parametrize(
    "data",
    [
        bytes(range(256)) * 16 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + b"\x01" * 500 + b"\n\n",
        b"GET / FTP/1.1\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: x\r\n: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA b: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: \0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        b"Authorization: Bearer s3cret\r\n\r\nzz\r\n",
    ],
    ids=lambda data: f"{data[:12]!r}-{len(data)}",
)
def test_what_is_no_http_is_told_in_json(server: HttpServer, data: bytes) -> None:
    status, told, _ = raw(server, data)
    assert status in (400, 431)
    assert told["error"].startswith("this is no HTTP request")
    assert ask(server)[0] == 200


@pytest.mark.parametrize(
    ("start", "token", "status", "word"),
    [
        ("POST /other HTTP/1.1", TOKEN, 404, "/echo"),
        ("POST /../../etc/passwd HTTP/1.1", TOKEN, 404, "/echo"),
        ("POST /echo/ HTTP/1.1", TOKEN, 404, "/echo"),
        ("POST http://elsewhere/echo HTTP/1.1", TOKEN, 404, "/echo"),
        ("PUT /echo HTTP/1.1", TOKEN, 405, "POST"),
        ("GET /echo HTTP/1.1", TOKEN, 405, "POST"),
        ("TRACE /echo HTTP/1.1", TOKEN, 405, "POST"),
        ("QUERY /echo HTTP/1.1", TOKEN, 405, "POST"),
        ("CONNECT /echo HTTP/1.1", TOKEN, 405, "POST"),
        ("GET /broken HTTP/1.1", TOKEN, 500, "RuntimeError in the server"),
        ("POST /echo HTTP/1.1", None, 401, "token"),
        ("POST /echo HTTP/1.1", TOKEN[:-1], 401, "token"),
        ("POST /echo HTTP/1.1", TOKEN + "x", 401, "token"),
        ("POST /echo HTTP/1.1", "\xff\xfe", 401, "token"),
        ("POST /echo HTTP/1.1", f"x\r\nAuthorization: Bearer {TOKEN}", 401, "token"),
    ],
)
def test_errors_are_json(
    server: HttpServer, start: str, token: str | None, status: int, word: str
) -> None:
    found, told, head = ask(server, start=start, token=token)
    assert (found, word in told["error"]) == (status, True), told
    assert TOKEN not in told["error"]
    assert (b"allow: POST" in head) == (status == 405)


def test_head_has_no_body(server: HttpServer) -> None:
    assert ask(server, start="HEAD /broken HTTP/1.1")[:2] == (500, None)


def test_an_answer_that_breaks_off_is_not_ended_as_if_whole(server: HttpServer) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /half HTTP/1.1\r\nHost: x\r\n\r\n")
        received = read_all(connection)
        assert b"one" in received
        assert not received.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a": NaN}', "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "1e999 is no number"),
        (b"[" + b"9" * 5000 + b"]", "not JSON"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        ("[]".encode("utf-16"), "not UTF-8"),
        (b"\xef\xbb\xbf[]", "not JSON"),
        (b"[" * 90_000, "100 levels"),
        (b"[" * 20_000 + b"]" * 20_000, "100 levels"),
        (b"[" * 102 + b"]" * 102, "100 levels"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
    ],
    ids=lambda value: f"{value[:12]!r}-{len(value)}",
)
def test_bodies_that_are_not_json_are_told(server: HttpServer, body: bytes, word: str) -> None:
    status, told, _ = ask(server, body)
    assert (status, word in told["error"]) == (400, True), told
    assert ask(server, b"[" * 100 + b"]" * 100)[0] == 200


def test_long_bodies_are_refused_and_the_client_hears_it(server: HttpServer) -> None:
    for size in (MAX_BODY + 1, 5_000_000):
        status, told, _ = ask(server, b" " * size)
        assert (status, f"at most {MAX_BODY} are read" in told["error"]) == (413, True)
    chunk = b"c8\r\n" + b" " * 200 + b"\r\n"
    head = f"POST /echo HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert raw(server, head.encode() + chunk * 1000 + b"0\r\n\r\n")[0] == 413
    # Who asks before sending is told at once, and sends nothing.
    assert ask(server, length="9999999", headers="Expect: 100-continue")[0] == 413


def test_no_answer_holds_what_json_has_not() -> None:
    loop: list[Any] = []
    loop.append(loop)
    values = {
        "nan": float("nan"),
        "deep": [{"inf": float("-inf")}],
        1: (1.5, Path("/x"), True),
    }
    told = json.loads(bytes(answer(values).body), parse_constant=pytest.fail)
    assert told == {"nan": None, "deep": [{"inf": None}], "1": [1.5, "/x", True]}
    with pytest.raises(RecursionError):
        answer(loop)
    with pytest.raises(Refusal):
        parse_json(b"NaN")


def drip(connections: list[socket.socket], stop: threading.Event, every: float) -> None:
    while not stop.wait(every):
        for connection in connections:
            with suppress(OSError):
                connection.sendall(b"b")


@pytest.mark.parametrize(
    "start",
    [
        b"POST /echo HTTP/1.1\r\nX-a: ",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\n"
        b"Content-Length: 9999\r\n\r\n",
        b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n",
        b"",
    ],
    ids=["head", "body", "refused", "silent"],
)
def test_a_crowd_of_slow_clients_locks_nobody_out_and_goes(start: bytes) -> None:
    stop = threading.Event()
    with (
        serving(
            connections=16, connections_per_address=12, head_seconds=1.5, body_seconds=1.5
        ) as server,
        ExitStack() as stack,
    ):
        slow = [stack.enter_context(connect(server)) for _ in range(64)]
        for each in slow:
            with suppress(OSError):  # it may have had to make room already
                each.sendall(start)
        thread = threading.Thread(target=drip, args=(slow, stop, 0.2), daemon=True)
        thread.start()
        began = time.monotonic()
        for _ in range(5):
            assert ask(server)[0] == 200
        assert time.monotonic() - began < 1.5, "served only once the slow were gone"
        answers = [read_all(each) for each in slow]
        stop.set()
        thread.join()
    assert time.monotonic() - began < 8
    told = [each for each in answers if each]
    assert told
    assert all(each.startswith((b"HTTP/1.1 408", b"HTTP/1.1 404")) for each in told)


def test_who_does_not_read_its_answer_is_dropped() -> None:
    with serving(connections=1, answer_seconds=0.5) as server, connect(server) as deaf:
        deaf.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.2)
        # All places are busy: the newcomer is closed, until the deadline has freed the place.
        deadline = time.monotonic() + 5
        while True:
            try:
                if ask(server)[0] == 200:
                    break
            except (OSError, AssertionError):
                pass
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_connection_is_kept_between_requests_and_not_for_ever() -> None:
    request = (
        f"POST /echo HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        "Content-Length: 2\r\n\r\n[]"
    ).encode()
    with serving(idle_seconds=1) as server, connect(server) as connection:
        for _ in range(3):
            connection.sendall(request)
            received = b""
            while not received.endswith(b"[]"):
                received += connection.recv(65536)
            time.sleep(0.2)
        began = time.monotonic()
        assert connection.recv(1) == b""
        assert time.monotonic() - began < 3


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    made = subprocess.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 "
        "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 && cat cert.pem key.pem > both.pem"
        " && openssl rsa -aes128 -passout pass:x -in key.pem -out locked.pem"
        " && cat cert.pem locked.pem > locked_both.pem",
        shell=True,
        cwd=folder,
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("needs openssl to make a certificate")
    return folder / "both.pem"


def test_handshakes_that_do_not_come_lock_nobody_out(certificate: Path) -> None:
    context = ssl.create_default_context(cafile=str(certificate.with_name("cert.pem")))
    with (
        serving(
            certificate, connections=16, connections_per_address=12, head_seconds=1.0
        ) as server,
        ExitStack() as stack,
    ):
        silent = [stack.enter_context(connect(server)) for _ in range(64)]
        for _ in range(3):
            with context.wrap_socket(connect(server), server_hostname="127.0.0.1") as connection:
                connection.sendall(b"GET /nowhere HTTP/1.0\r\n\r\n")
                assert read_all(connection).startswith(b"HTTP/1.1 404")
        began = time.monotonic()
        for each in silent:
            read_all(each)
        assert time.monotonic() - began < 5


def test_a_certificate_with_a_password_is_refused_without_asking(certificate: Path) -> None:
    with pytest.raises(InputError, match="without a password"):
        HttpServer(APP, Address(certificate=certificate.with_name("locked_both.pem")))


@pytest.mark.parametrize("host", ["no such host", "256.1.1.1", "a" * 300, "\0", "x..y"])
def test_an_address_that_is_none_is_one_sentence(host: str) -> None:
    with pytest.raises(InputError, match="cannot listen on"):
        HttpServer(APP, Address(host=host))


def test_networks() -> None:
    assert network_of("10.0.0.1") == "10.0.0.1"
    assert network_of("::ffff:10.0.0.1") == "10.0.0.1"
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:1") == "2001:db8::/64"
    assert network_of("fe80::1%eth0") == "fe80::/64"


def test_places_are_given_back() -> None:
    with LimitedListener("127.0.0.1", 0, total=2, per_address=2) as listener:
        address = listener.getsockname()
        clients, taken = [], []
        for _ in range(2):
            clients.append(socket.create_connection(address))
            taken.append(listener.accept()[0])
            listener.mark(taken[-1].fileno(), busy=True)
        clients.append(socket.create_connection(address))
        with pytest.raises(ConnectionAbortedError, match="busy"):
            listener.accept()
        taken[0].close()
        clients.append(socket.create_connection(address))
        taken.append(listener.accept()[0])
        for each in (*clients, *taken):
            each.close()
