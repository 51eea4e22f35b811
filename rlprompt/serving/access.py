"""Who may ask a server what: keys with scopes and rates."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from starlette.requests import Request

from rlprompt.errors import InputError
from rlprompt.reading import json_text
from rlprompt.reading.files import read_bytes, reason
from rlprompt.serving.connections import is_loopback
from rlprompt.serving.json_api import Refusal
from rlprompt.settings import Settings

Scope = Literal["chat", "admin", "metrics", "prompts"]
KEYS_VARIABLE = "RLPROMPT_SERVE_KEYS"
_SHORTEST_KEY = 16


class KeySettings(Settings):
    """One key of a keys file."""

    name: str = Field(min_length=1, max_length=64)
    """Who holds it; logs and metrics say this and never the key."""
    key: str | None = Field(default=None, min_length=_SHORTEST_KEY)
    """The key itself."""
    key_env: str | None = None
    """The environment variable that holds it."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """sha256 of the key in hexadecimal, so that the file holds no secret."""
    scopes: tuple[Scope, ...] = Field(default=("chat",), min_length=1)
    """What it opens."""
    requests_per_minute: float | None = Field(default=None, gt=0, le=1e9)
    """Requests on average; null = any number."""

    def digest(self) -> bytes:
        """sha256 of the key.

        Raises:
            InputError: none or several of the three ways to give it are used, or the variable holds
                no key.
        """
        given = [each for each in (self.key, self.key_env, self.sha256) if each is not None]
        if len(given) != 1:
            raise InputError(
                f"the key '{self.name}' has {len(given)} of key, key_env and sha256; give one"
            )
        if self.sha256 is not None:
            return bytes.fromhex(self.sha256)
        key = self.key or os.environ.get(self.key_env or "", "").strip()
        if len(key) < _SHORTEST_KEY:
            raise InputError(
                f"the environment variable {self.key_env} of the key '{self.name}' holds no key of "
                f"at least {_SHORTEST_KEY} characters; set it"
            )
        return _digest(key)


class KeysFile(Settings):
    """The content of a keys file."""

    keys: tuple[KeySettings, ...] = Field(min_length=1)
    """The keys."""


@dataclass
class _Bucket:
    """What a key may still ask: fills up at its rate, up to ten seconds of it."""

    per_second: float
    left: float
    at: float

    @property
    def most(self) -> float:
        """Requests that may come at once."""
        return max(1.0, 10.0 * self.per_second)


class Access:
    """The keys of a server; without any, whoever reaches it may do everything."""

    def __init__(self, keys: Sequence[KeySettings] = ()) -> None:
        """Take the keys.

        Args:
            keys: the keys.

        Raises:
            InputError: a key is not given, or two are the same.
        """
        self._keys = [(each.digest(), each) for each in keys]
        if len({digest for digest, _ in self._keys}) < len(self._keys):
            raise InputError("two keys are the same; give each client one of its own")
        if len({each.name for each in keys}) < len(keys):
            raise InputError("two keys have one name; give each a name of its own")
        self._lock = threading.Lock()
        self._buckets = {
            each.name: _Bucket(each.requests_per_minute / 60.0, math.inf, time.monotonic())
            for each in keys
            if each.requests_per_minute is not None
        }

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a key."""
        return not self._keys

    def admit(self, request: Request, scope: Scope) -> str:
        """Let a request pass; the time that it takes says nothing of the keys.

        Args:
            request: the request.
            scope: what it asks for.

        Returns:
            The name of the key; empty without keys.

        Raises:
            Refusal: 401, the key is missing or wrong; 403, it does not open this, or a page of
                another site asks a server without keys; 429, it has asked too often.
        """
        if self.is_open:
            _refuse_other_sites(request)
            return ""
        given = _key(request, scope)
        digest = _digest(given)
        found: KeySettings | None = None
        for known, settings in self._keys:  # all of them: the time says nothing
            if hmac.compare_digest(known, digest):
                found = settings
        if found is None or not given:
            raise Refusal(
                401,
                "the API key is missing or wrong; send Authorization: Bearer KEY",
                {"WWW-Authenticate": "Bearer"},
                code="invalid_api_key",
            )
        if scope not in found.scopes:
            raise Refusal(403, f"the key '{found.name}' does not open {scope}; use another one")
        if scope in ("chat", "prompts"):
            self._count(found.name)
        return found.name

    def _count(self, name: str) -> None:
        bucket = self._buckets.get(name)
        if bucket is None:
            return
        with self._lock:
            now = time.monotonic()
            bucket.left = min(bucket.most, bucket.left + (now - bucket.at) * bucket.per_second)
            bucket.at = now
            if bucket.left < 1.0:
                wait = math.ceil((1.0 - bucket.left) / bucket.per_second)
                raise Refusal(
                    429,
                    f"the key '{name}' has asked too often; ask again in {wait} seconds",
                    {"Retry-After": str(wait)},
                    code="rate_limit_exceeded",
                )
            bucket.left -= 1.0


def open_access(path: Path | None, host: str) -> Access:
    """The keys of a file, or of the environment variable `RLPROMPT_SERVE_KEYS`.

    Args:
        path: the file; None = the variable, or no keys where that is not set.
        host: the address that the server listens on.

    Raises:
        InputError: the keys cannot be read, or other machines could ask without one.
    """
    if path is not None:
        try:
            return _parsed(read_bytes(path), f"'{path}'")
        except OSError as error:
            raise InputError(
                f"'{path}' cannot be read ({reason(error)}); name a file with keys"
            ) from error
    content = os.environ.get(KEYS_VARIABLE, "").strip()
    if content:
        return _parsed(content.encode(), f"the environment variable {KEYS_VARIABLE}")
    if not is_loopback(host):
        raise InputError(
            f"other machines could ask a server on {host} without a key; give --keys, or listen on "
            "127.0.0.1"
        )
    return Access()


def _parsed(content: bytes, where: str) -> Access:
    try:
        return Access(KeysFile.model_validate(json_text.loads(content)).keys)
    except InputError:
        raise
    except ValidationError as error:
        first = error.errors(include_input=False)[0]  # the input may be a key
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where} holds no keys ({place}: {first['msg']}); mend it") from None
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); mend it") from error


def _key(request: Request, scope: Scope) -> str:
    """The key that a request brings; empty, which is no key, where it brings none.

    Clients of prompt registries send Basic, with the key as the password: Langfuse's its public and
    secret key, MLflow's a user name and a password.
    """
    given = request.headers.getlist("authorization")
    scheme, _, rest = (given[0] if len(given) == 1 else "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() != "basic" or scope != "prompts":
        return ""
    try:
        pair = base64.b64decode(rest.strip(), validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
    return pair.partition(":")[2]


def _refuse_other_sites(request: Request) -> None:
    """A page that somebody reads here may not use what only this machine reaches."""
    host = request.headers.get("host", "")
    name = host.rsplit(":", 1)[0].strip("[]") if not host.endswith("]") else host.strip("[]")
    if not (name == "localhost" or name == "::1" or name.startswith("127.")):
        raise Refusal(403, f"this server has no keys and answers on loopback, not as {host!r}")
    origin = request.headers.get("origin")
    if origin is not None and origin.split("://", 1)[-1] != host:
        raise Refusal(403, f"a page of {origin!r} may not ask a server without keys; start it with "
                           "--keys")  # fmt: skip


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
