"""What every server of ours does alike: JSON in, JSON out, errors too, and who may ask.

An endpoint is a coroutine from a Starlette request to a response. It raises `Refusal` for what the
client did wrong; whatever else goes wrong, clients get a status and `{"error": sentence}`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from rlprompt.errors import InputError

logger = logging.getLogger(__name__)

Call = Callable[[Request], Awaitable[Response]]

_MAX_DEPTH = 100


class Refusal(Exception):
    """A request that is not served.

    Args:
        status: the HTTP status, 400 to 599.
        sentence: what was wrong and what to do.
        headers: what else the answer says, such as `Retry-After`.
        param: the field of the request that was wrong; None = none in particular.
        code: a word for programs, such as `model_not_found`.
    """

    def __init__(
        self,
        status: int,
        sentence: str,
        headers: Mapping[str, str] | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, dict(headers or {})
        self.param, self.code = param, code


@dataclass(frozen=True)
class Endpoint:
    """What a server answers at a path."""

    method: str
    """Such as `POST`; `GET` answers HEAD too."""
    path: str
    """Such as `/score`."""
    call: Call
    """The coroutine."""


ErrorBody = Callable[[Refusal], Any]
"""What a client is told of a request that is not served."""


def plain_error(refusal: Refusal) -> Any:
    """`{"error": sentence}`.

    Args:
        refusal: why the request is not served.
    """
    return {"error": refusal.sentence}


def json_app(endpoints: Sequence[Endpoint], error_body: ErrorBody = plain_error) -> ASGIApp:
    """An application whose every error is JSON, and every answer that is not a file.

    Args:
        endpoints: what it answers; a path may have parts such as `{name}`.
        error_body: function that makes the body of an answer to what is not served.
    """
    known = ", ".join(f"{each.method} {each.path}" for each in endpoints)

    async def lost(scope: Scope, receive: Receive, send: Send) -> None:
        raise Refusal(404, f"there is no {scope['path']}; known are {known}")

    calls: dict[str, dict[str, Call]] = {}
    for each in endpoints:
        calls.setdefault(each.path, {})[each.method] = each.call
    routes = [Route(path, _Methods(by_method)) for path, by_method in calls.items()]
    return _Guarded(Router(routes, redirect_slashes=False, default=lost), error_body)


def answer(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response in JSON; numbers that JSON has not (NaN, infinities) become null.

    Args:
        body: the value; what is neither JSON's nor a number of NumPy's or torch's becomes a string.
        status: the HTTP status.
        headers: further headers.

    Raises:
        ValueError: it contains itself, or an integer of thousands of digits.
        RecursionError: it is nested too deeply.
    """
    data = json.dumps(_plain(body), allow_nan=False).encode()
    return Response(data, status, headers=headers, media_type="application/json")


async def read_json(request: Request, max_bytes: int) -> Any:
    """The body of a request.

    Args:
        request: the request, of whose body nothing was read.
        max_bytes: the longest body.

    Raises:
        Refusal: 413, it is too long; 400, it is not JSON.
    """
    data = await read_body(request, max_bytes)
    # Sixteen megabytes take a third of a second: others are served meanwhile.
    return await asyncio.to_thread(parse_json, data)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The bytes of a request's body.

    Raises:
        Refusal: 413, there are more than `max_bytes`.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise Refusal(413, f"the body has {announced} bytes; at most {max_bytes} are read")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise Refusal(413, f"the body has over {max_bytes} bytes; at most {max_bytes} are read")
        parts.append(part)
    return b"".join(parts)


def parse_json(data: bytes) -> Any:
    """A JSON text, read strictly: what two readers could take differently is refused.

    Raises:
        Refusal: 400, it is not UTF-8, not JSON, has NaN or an infinity, names a key twice in an
            object, or is nested deeper than 100 levels.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_no_number,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8 at byte {error.start}; correct it") from error
    except json.JSONDecodeError as error:
        where = f"{error.msg} at character {error.pos}"
        raise Refusal(400, f"the body is not JSON ({where}); correct it") from error
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON ({error}); correct it") from error
    except RecursionError as error:
        raise _too_deep() from error
    _check_depth(value)
    return value


class BearerToken:
    """Whom a server lets in: requests with `Authorization: Bearer TOKEN`.

    Args:
        token: the token; None lets everybody in.
    """

    def __init__(self, token: str | None) -> None:
        self._digest = None if token is None else _digest(token.encode())

    def check(self, request: Request) -> None:
        """Let a request pass; the time that it takes says nothing of the token.

        Raises:
            Refusal: 401, the token is missing or wrong.
        """
        if self._digest is None:
            return
        given = request.headers.getlist("authorization")
        scheme, _, token = (given[0] if len(given) == 1 else "").partition(" ")
        right = hmac.compare_digest(_digest(token.strip().encode("latin-1")), self._digest)
        if not right or scheme.lower() != "bearer":
            raise Refusal(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})


class _Guarded:
    """The outermost layer: nothing gets past it but JSON."""

    def __init__(self, app: ASGIApp, error_body: ErrorBody) -> None:
        self._app = app
        self._error_body = error_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status: int | None = None
        whole = False

        async def take() -> MutableMapping[str, Any]:
            nonlocal whole
            message = await receive()
            whole = whole or not message.get("more_body", False)
            return message

        async def give(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, take, give)
        except (Exception, asyncio.CancelledError) as error:
            if status is not None:
                raise  # uvicorn closes the connection: the rest of the answer is lost, visibly
            refusal = _refusal_of(error)
            if refusal is None:
                return
            response = answer(self._error_body(refusal), refusal.status, refusal.headers)
            if not whole:
                await _discard(scope, take)
            await response(scope, take, give)
        finally:
            client = scope.get("client") or ("unknown", 0)
            logger.info("%s %s %s %s", client[0], scope["method"], scope["path"], status)


def _refusal_of(error: BaseException) -> Refusal | None:
    """What a client is told of an error; None = it has gone."""
    if isinstance(error, ClientDisconnect):
        return None
    if isinstance(error, Refusal):
        return error
    if isinstance(error, asyncio.CancelledError):
        return Refusal(503, "the server is stopping; ask again", {"Retry-After": "5"})
    if isinstance(error, InputError):
        logger.warning("%s", error)
        return Refusal(500, str(error))
    logger.error("a request failed", exc_info=error)
    return Refusal(500, f"{type(error).__name__} in the server; see its log")


async def _discard(scope: Scope, receive: Receive, max_bytes: int = 1 << 24) -> None:
    """Read what a refused client still sends, in bounds: closing at once would lose our answer.

    A client that asks with `Expect: 100-continue` waits for leave to send, which it does not get.
    """
    if any(name == b"expect" for name, _ in scope["headers"]):
        return
    left = max_bytes
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return


class _Methods:
    """A path's application; HEAD is GET without the body, which the server leaves out."""

    def __init__(self, calls: Mapping[str, Call]) -> None:
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in self._calls:
            allowed = ", ".join(self._calls)
            sentence = f"{scope['path']} knows no {scope['method']}; it knows {allowed}"
            raise Refusal(405, sentence, {"Allow": allowed})
        response = await self._calls[method](Request(scope, receive, send))
        await response(scope, receive, send)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(each) for each in value]
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return _plain(value.item())
    return str(value)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _containers(outer)]
        if not level:
            return
    raise _too_deep()


def _containers(value: Any) -> list[Any]:
    inside = value.values() if isinstance(value, dict) else value
    found = isinstance(value, dict | list)
    return [each for each in inside if isinstance(each, dict | list)] if found else []


def _too_deep() -> Refusal:
    return Refusal(400, f"the body is not JSON of at most {_MAX_DEPTH} levels; flatten it")


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON's")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number of 64 bits")
    return value


def _unique(pairs: list[Any]) -> dict[str, Any]:
    """An object of its pairs of key and value, as `json` hands them over."""
    made = dict(pairs)
    if len(made) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return made


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()
