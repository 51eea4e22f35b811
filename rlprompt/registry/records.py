"""What a registry writes down: versions and changes of aliases, one line of JSON each.

Both files are only ever appended to. A line that a crash has cut short has no line feed; it never
happened, and the next writer cuts it off.
"""

from __future__ import annotations

import datetime
import getpass
import os
import re
import socket
from typing import Annotated

from pydantic import Field, field_validator

from rlprompt.errors import InputError
from rlprompt.settings import Settings

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")

Share = Annotated[float, Field(gt=0.0, le=1.0)]


class Version(Settings):
    """One version of a named prompt; nothing in it ever changes."""

    number: int = Field(ge=1)
    """1, 2, 3, ... within the name."""
    content: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of all files of the artifact, which lies under this name."""
    prompt: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of what the prompt is (`rlprompt.artifacts.identity.prompt_hash`): equal for two
    versions that differ in card, metrics or certificate only."""
    tags: tuple[str, ...] = ()
    """Words to find it by."""
    message: str = ""
    """Why it was added."""
    by: str
    """Who added it."""
    at: str
    """UTC time, ISO 8601."""


class Target(Settings):
    """A version and its share of what an alias sends."""

    version: int = Field(ge=1)
    """Number of the version."""
    share: Share = 1.0
    """Of the requests; the shares of an alias sum to 1."""


class AliasChange(Settings):
    """One change of an alias."""

    alias: str
    """The alias."""
    to: tuple[Target, ...]
    """What it has pointed to since; empty = it was removed."""
    before: tuple[Target, ...] = ()
    """What it pointed to until then; empty = there was no such alias."""
    why: str = ""
    """The reason given."""
    passed: tuple[str, ...] = ()
    """What the gate has found fulfilled, in words."""
    is_rollback: bool = False
    """Whether it went back to what stood before."""
    forced: bool = False
    """Whether a gate that refused was overruled."""
    by: str
    """Who changed it."""
    at: str
    """UTC time, ISO 8601."""


class Protection(Settings):
    """What a version must have before an alias may point to it."""

    verdict: bool = False
    """A run that has shown it to be better than what it began with."""
    certificate: Share | None = None
    """A certificate with an alpha of at most this."""
    reward: str | None = None
    """The certificate must be about this reward, by name."""

    @field_validator("reward")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("the reward's name is blank; give one, or leave it out")
        return value


def check_name(name: str, what: str) -> str:
    """The name itself, where it can be one.

    Args:
        name: what somebody calls a prompt, an alias or a tag.
        what: word for it in the error.

    Raises:
        InputError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{what} {name[:80]!r} cannot be used; take small letters, digits, dots, dashes and "
            "underscores, at most 64, with a letter or digit at both ends"
        )
    return name


def now() -> str:
    """UTC time, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def whoever() -> str:
    """Who is at work: `RLPROMPT_USER`, or user and machine."""
    given = os.environ.get("RLPROMPT_USER")
    if given:
        return given
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a number without an entry, as in containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
