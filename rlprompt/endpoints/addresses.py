"""Servers of others: what is an address, which ones are near, whom to trust, what must not be told.

An address may hold `${NAME}` for a variable of the environment, since recipes are copied into
artifacts. What is quoted of a server's answer holds no secret: a server may say it back.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import ssl
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import SplitResult, quote, urlsplit

from rlprompt.errors import InputError, describe_error, shorten

VARIABLE = re.compile(r"\$\{(\w+)\}")
"""How a setting names an environment variable."""
_PIECE = 8
"""Characters of a secret that are left out wherever they follow each other."""
_HIDDEN = "[secret]"


def with_variables(text: str, key: str) -> str:
    """A text with the environment's values in it.

    Args:
        text: value of a setting, in which `${NAME}` is an environment variable.
        key: name of the setting, for the error message.

    Raises:
        InputError: a variable is not set.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1]
        given = os.environ.get(name, "").strip()
        if not given:
            raise InputError(f"the environment variable {name} ({key}) is not set; set it")
        return given

    return VARIABLE.sub(value, text)


def address_parts(url: str, key: str, token_key: str) -> SplitResult:
    """The parts of an address that can be asked.

    Args:
        url: the address, with values in place of variables.
        key: name of its setting, for error messages.
        token_key: name of the setting that a secret belongs into.

    Raises:
        InputError: it is none, or holds a user name or a password.
    """
    import httpx

    known = re.sub(r"//[^/?#]*@", "//", re.split(r"[?#]", url)[0])  # what may be shown of it
    advice = "write http(s)://host[:port]/path"
    if not url.isprintable() or " " in url:
        raise InputError(f"{key} {known!r} holds blanks or line breaks; {advice}")
    try:
        parts = urlsplit(url)
        port = parts.port
        httpx.URL(url)
        (parts.hostname or "").encode("idna")
    except (ValueError, httpx.InvalidURL) as error:
        raise InputError(
            f"{key} {known!r} is no address ({shorten(str(error))}); {advice}"
        ) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise InputError(f"{key} {known!r} is no address; {advice}")
    if parts.username or parts.password:
        raise InputError(f"the {key} holds a user name or password; use {token_key} instead")
    return parts


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    if host.rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_own_server(host: str) -> bool:
    """Whether a Slurm job has started a server there, beside this run (see `slurm/server.sh`)."""
    return "SLURM_JOB_ID" in os.environ and host == os.environ.get("SERVER", "").lower()


def trusted(ca_file: str | None) -> ssl.SSLContext:
    """The authorities that may have signed a server's certificate.

    Args:
        ca_file: path of a PEM file of one's own; None = those that the system knows.

    Raises:
        InputError: the file cannot be read or holds none.
    """
    if ca_file is None:
        return ssl.create_default_context()
    if not Path(ca_file).exists():
        raise InputError(f"ca_file {ca_file!r} does not exist; correct the path")
    if not Path(ca_file).is_file():
        raise InputError(f"ca_file {ca_file!r} is no file; name the PEM file")
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ValueError) as error:
        raise InputError(
            f"ca_file {ca_file!r} cannot be read as certificates ({describe_error(error)}); give "
            f"a PEM file of the authority that signed the server's certificate"
        ) from error


def is_certificate_error(error: BaseException) -> bool:
    """Whether a connection failed for the server's certificate."""
    return isinstance(error.__cause__, ssl.SSLError) or "CERTIFICATE_VERIFY" in str(error)


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """A text in which no secret stands, nor a longer piece of one.

    Args:
        text: text of a server, which may repeat what it was sent.
        secrets: texts that nobody may read; an empty one is none.
    """
    for secret in filter(None, secrets):
        written = {secret, quote(secret, safe=""), json.dumps(secret)[1:-1]}
        for form in sorted(written, key=len, reverse=True):
            text = text.replace(form, _HIDDEN)
        text = _without_pieces(text, secret)
    return text


def _without_pieces(text: str, secret: str) -> str:
    """The text without the runs of characters that stand in a secret in the same order."""
    hidden = bytearray(len(text))
    for start in range(len(secret) - _PIECE + 1):
        piece = secret[start : start + _PIECE]
        at = text.find(piece)
        while at >= 0:
            hidden[at : at + _PIECE] = b"\1" * _PIECE
            at = text.find(piece, at + 1)
    shown = []
    for at, character in enumerate(text):
        if not hidden[at]:
            shown.append(character)
        elif at == 0 or not hidden[at - 1]:
            shown.append(_HIDDEN)
    return "".join(shown)
