"""A registry behind HTTP, to be read: the prompts that are texts, and the names of all others.

    GET /prompts                                   all names, with versions, hashes and aliases
    GET /prompts/NAME?version=|alias=&key=         one version, with its text where it is one

`serving.registry_clients` has the paths that clients of Langfuse and MLflow read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from rlprompt.errors import InputError
from rlprompt.registry.catalog import Catalog, CatalogVersion, UnknownPromptError
from rlprompt.serving.json_api import Call, Endpoint, ErrorBody, Refusal, answer

logger = logging.getLogger(__name__)

Admit = Callable[[Request], object]
"""Lets a request pass, or raises `Refusal`."""
DEFAULT_ALIASES = ("production", "prod")
"""What is meant where a request names neither version nor alias: the first that is there."""

_Result = TypeVar("_Result")


def registry_endpoints(catalog: Catalog, admit: Admit) -> list[Endpoint]:
    """The paths of ours.

    Args:
        catalog: the registry.
        admit: what every request has to pass.
    """

    async def every(request: Request) -> Response:
        read_query(request, ())
        return answer({"prompts": await read(_listed, catalog)}, headers=UNCACHED)

    async def one(request: Request) -> Response:
        given = read_query(request, ("version", "alias", "key"))
        found = await read(
            find, catalog, request.path_params["name"], given, "alias", given.get("key")
        )
        return answer(_whole(found), headers=told_of(found))

    return [
        Endpoint("GET", "/prompts", admitted(every, admit)),
        Endpoint("GET", "/prompts/{name}", admitted(one, admit)),
    ]


UNCACHED = {"Cache-Control": "no-store"}
"""Headers of what only holders of a key may see, and what may be another text the next time."""


def told_of(found: CatalogVersion) -> dict[str, str]:
    """The headers of an answer about one version.

    Args:
        found: the version.
    """
    return {**UNCACHED, "x-rlprompt-prompt": found.version.prompt}


def admitted(call: Call, admit: Admit, error_body: ErrorBody | None = None) -> Call:
    """An endpoint that lets in who may read, and tells errors as its clients read them.

    Args:
        call: the endpoint.
        admit: what every request has to pass.
        error_body: function that makes the body of a refusal; None = that of the whole server.
    """

    async def checked(request: Request) -> Response:
        try:
            admit(request)
            return await call(request)
        except Refusal as refusal:
            if error_body is None:
                raise
            return answer(error_body(refusal), refusal.status, refusal.headers)

    return checked


async def read(work: Callable[..., _Result], *arguments: Any) -> _Result:
    """The result of work with the registry's files, beside the event loop.

    Args:
        work: function that reads.
        arguments: its arguments.

    Raises:
        Refusal: 404, what is asked for is not there; 503, the registry cannot be read.
    """
    reading: Awaitable[_Result] = asyncio.to_thread(work, *arguments)
    try:
        return await reading
    except UnknownPromptError as error:
        raise Refusal(404, str(error), code="prompt_not_found") from error
    except InputError as error:  # it names files of this machine
        logger.warning("the registry cannot be read: %s", error)
        raise Refusal(
            503,
            "the registry cannot be read, and the server's log says why; ask again when it is "
            "mended",
            {"Retry-After": "60"},
            code="registry_unreadable",
        ) from error


def read_query(request: Request, known: Collection[str]) -> dict[str, str]:
    """The parameters behind the question mark; an empty one counts as none.

    Args:
        request: the request.
        known: the names that have an effect.

    Raises:
        Refusal: 400, one is not known, or stands there twice.
    """
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        shown = name[:80]
        if name not in known:
            others = ", ".join(known) or "none"
            raise Refusal(
                400, f"the parameter {shown!r} is not known here; known are {others}", param=shown
            )
        if name in found:
            raise Refusal(400, f"the parameter {shown!r} stands there twice; give it once",
                          param=shown)  # fmt: skip
        found[name] = value
    return {name: value for name, value in found.items() if value}


def whole_number(given: dict[str, str], name: str, default: int, most: int) -> int:
    """A parameter that counts from 1.

    Args:
        given: parameters of the request.
        name: name of the parameter.
        default: value where it is not given.
        most: largest value.

    Raises:
        Refusal: 400, it is no such number.
    """
    value = given.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal() and len(value) <= 10 and 1 <= int(value) <= most):
        raise Refusal(400, f"{name} is no whole number from 1 to {most}; correct it", param=name)
    return int(value)


def find(
    catalog: Catalog, name: str, given: dict[str, str], alias_word: str, key: str | None = None
) -> CatalogVersion:
    """The version that a request asks for.

    Args:
        catalog: the registry.
        name: name of the prompt.
        given: parameters of the request, of which `version` and the alias count.
        alias_word: what the parameter with the alias is called.
        key: text that an alias with shares decides by; see `Catalog.pointed`.

    Raises:
        Refusal: 400, version and alias are both given, or the version is no number.
        UnknownPromptError: there is no such version.
        InputError: the registry is damaged.
    """
    if "version" in given and alias_word in given:
        raise Refusal(
            400, f"version and {alias_word} are both given; give one of them", param="version"
        )
    if "version" in given:
        if key is not None:
            raise Refusal(400, "key has no effect beside version; leave it out", param="key")
        return catalog.version(name, whole_number(given, "version", 1, 10**9))
    if alias_word in given:
        return catalog.pointed(name, given[alias_word], key)
    known = catalog.aliases(name)
    for alias in DEFAULT_ALIASES:
        if alias in known:
            return catalog.pointed(name, alias, key)
    raise UnknownPromptError(
        f"'{name}' has neither of the aliases {' and '.join(DEFAULT_ALIASES)}, which are meant "
        f"where none is named; it has {', '.join(sorted(known)) or 'none'}"
    )


def _listed(catalog: Catalog) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "versions": [_card(each) for each in catalog.versions(name)],
            "aliases": {
                alias: [{"version": each.version, "share": each.share} for each in targets]
                for alias, targets in sorted(catalog.aliases(name).items())
            },
        }
        for name in catalog.names()
    ]


def _card(found: CatalogVersion) -> dict[str, Any]:
    version = found.version
    return {
        "version": version.number,
        "hash": version.prompt,
        "kind": found.kind,
        "base": found.base,
        "aliases": list(found.aliases),
        "tags": list(version.tags),
        "message": version.message,
        "by": version.by,
        "at": version.at,
    }


def _whole(found: CatalogVersion) -> dict[str, Any]:
    return {"name": found.name, **_card(found), "prompt": found.text}
