"""A registry as clients of Langfuse and of MLflow read it.

    GET /api/public/v2/prompts, /api/public/v2/prompts/NAME      Langfuse
    GET /api/2.0/mlflow/registered-models/get, .../alias, .../search
    GET /api/2.0/mlflow/model-versions/get, .../search           MLflow

An alias is a label of Langfuse's. In MLflow a prompt is a registered model, and its text the tag
`mlflow.prompt.text` of a version. Both know only texts, so what was learned as numbers is not in
their lists. What would write is refused: `rlprompt registry` does that.
"""

from __future__ import annotations

import datetime
import itertools
import math
import operator
import re
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rlprompt.registry.catalog import Catalog, CatalogVersion
from rlprompt.serving.json_api import Endpoint, Refusal, answer
from rlprompt.serving.registry_api import (
    UNCACHED,
    Admit,
    admitted,
    find,
    read,
    read_query,
    told_of,
    whole_number,
)

_LANGFUSE = "/api/public/v2/prompts"
_MLFLOW = "/api/2.0/mlflow"
_IS_PROMPT = {"key": "mlflow.prompt.is_prompt", "value": "true"}
_MOST_ITEMS = 1000
_IS_PROMPT_CLAUSE = re.compile(r"tags?\.[`\"']?mlflow\.prompt\.is_prompt[`\"']?\s*(!?=)\s*'true'")
_NAME_CLAUSE = re.compile(r"(?:attributes?\.)?name\s*(=|!=|like|ilike)\s*'([^']*)'", re.IGNORECASE)


def client_endpoints(catalog: Catalog, admit: Admit) -> list[Endpoint]:
    """The paths that these clients read.

    Args:
        catalog: the registry.
        admit: what every request has to pass.
    """
    langfuse = _Langfuse(catalog)
    mlflow = _MLflow(catalog)
    calls = {
        "registered-models/get": mlflow.model,
        "registered-models/alias": mlflow.alias,
        "registered-models/search": mlflow.models,
        "model-versions/get": mlflow.version,
        "model-versions/search": mlflow.versions,
    }
    return [
        Endpoint("GET", _LANGFUSE, admitted(langfuse.every, admit, _langfuse_error)),
        Endpoint("GET", f"{_LANGFUSE}/{{name:path}}", admitted(langfuse.one, admit,
                                                               _langfuse_error)),
        Endpoint("POST", _LANGFUSE, admitted(_refuse_writing, admit, _langfuse_error)),
        *(
            Endpoint("GET", f"{_MLFLOW}/{path}", admitted(call, admit, _mlflow_error))
            for path, call in calls.items()
        ),
        *(
            Endpoint(method, f"{_MLFLOW}/{{path:path}}", admitted(_refuse_writing, admit,
                                                                  _mlflow_error))
            for method in ("POST", "PATCH", "DELETE")
        ),
        Endpoint("GET", f"{_MLFLOW}/{{path:path}}", admitted(_refuse_unknown, admit,
                                                             _mlflow_error)),
    ]  # fmt: skip


async def _refuse_writing(request: Request) -> Response:
    raise Refusal(
        403,
        f"{request.method} {request.url.path} would write, and this registry is only read here; "
        "use rlprompt registry",
        code="read_only",
    )


async def _refuse_unknown(request: Request) -> Response:
    raise Refusal(
        404,
        f"there is no {request.url.path[:200]} here, only what clients read prompts with; ask an "
        "MLflow server for the rest",
    )


class _Langfuse:
    """What Langfuse's clients ask."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def one(self, request: Request) -> Response:
        # `resolve` puts other prompts in the place of references, and no text of ours has any.
        given = read_query(request, ("version", "label", "resolve"))
        name = request.path_params["name"]
        found, text = await read(self._found, name, given)
        body = {
            "name": found.name,
            "version": found.version.number,
            "type": "text",
            "prompt": text,
            "config": _config(found),
            "labels": list(found.aliases),
            "tags": list(found.version.tags),
            "commitMessage": found.version.message or None,
            "createdAt": found.version.at,
            "updatedAt": found.version.at,
            "createdBy": found.version.by,
        }
        return answer(body, headers=told_of(found))

    async def every(self, request: Request) -> Response:
        words = ("name", "label", "tag", "version", "fromUpdatedAt", "toUpdatedAt")
        given = read_query(request, (*words, "page", "limit"))
        page = whole_number(given, "page", 1, 10**9)
        limit = whole_number(given, "limit", 50, 100)
        whole_number(given, "version", 1, 10**9)
        for word in ("fromUpdatedAt", "toUpdatedAt"):
            _time(given.get(word), word)
        found = await read(self._listed, given)
        meta = {
            "page": page,
            "limit": limit,
            "totalItems": len(found),
            "totalPages": math.ceil(len(found) / limit),
        }
        shown = found[(page - 1) * limit : page * limit]
        return answer({"data": shown, "meta": meta}, headers=UNCACHED)

    def _found(self, name: str, given: dict[str, str]) -> tuple[CatalogVersion, str]:
        found = find(self._catalog, name, given, "label")
        return found, found.must_be_text()

    def _listed(self, given: dict[str, str]) -> list[dict[str, Any]]:
        made = []
        for name in self._catalog.names():
            if given.get("name", name) != name:
                continue
            kept = [each for each in _texts(self._catalog, name) if _fits(each, given)]
            if kept:
                made.append(
                    {
                        "name": name,
                        "type": "text",
                        "versions": [each.version.number for each in kept],
                        "labels": sorted({alias for each in kept for alias in each.aliases}),
                        "tags": sorted({tag for each in kept for tag in each.version.tags}),
                        "lastUpdatedAt": max(each.version.at for each in kept),
                        "lastConfig": _config(kept[-1]),
                    }
                )
        return made


class _MLflow:
    """What MLflow's clients ask."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def model(self, request: Request) -> Response:
        given = _needed(request, "name")
        made = await read(self._model, given["name"])
        return answer({"registered_model": made}, headers=UNCACHED)

    async def alias(self, request: Request) -> Response:
        given = _needed(request, "name", "alias")
        made = await read(
            lambda: _model_version(self._catalog.pointed(given["name"], given["alias"]))
        )
        return answer({"model_version": made}, headers=UNCACHED)

    async def version(self, request: Request) -> Response:
        given = _needed(request, "name", "version")
        number = whole_number(given, "version", 1, 10**9)
        made = await read(lambda: _model_version(self._catalog.version(given["name"], number)))
        return answer({"model_version": made}, headers=UNCACHED)

    async def models(self, request: Request) -> Response:
        return await self._searched(request, "registered_models", lambda name: [self._model(name)])

    async def versions(self, request: Request) -> Response:
        def shown(name: str) -> list[dict[str, Any]]:
            return [_model_version(each) for each in _texts(self._catalog, name)]

        return await self._searched(request, "model_versions", shown)

    async def _searched(
        self, request: Request, word: str, shown: Callable[[str], list[dict[str, Any]]]
    ) -> Response:
        """A page of what a filter keeps; its token is the number of items before it."""
        given = read_query(request, ("filter", "max_results", "page_token", "order_by"))
        backwards = _is_backwards(given.get("order_by", ""))
        fits = _filter(given.get("filter", ""))
        most = whole_number(given, "max_results", 100, _MOST_ITEMS)
        begin = whole_number(given, "page_token", 0, 10**9)

        def listed() -> list[dict[str, Any]]:
            names = [each for each in self._catalog.names() if fits(each)]
            made = [one for name in names if _texts(self._catalog, name) for one in shown(name)]
            return made[::-1] if backwards else made

        found = await read(listed)
        body: dict[str, Any] = {word: found[begin : begin + most]}
        if begin + most < len(found):
            body["next_page_token"] = str(begin + most)
        return answer(body, headers=UNCACHED)

    def _model(self, name: str) -> dict[str, Any]:
        versions = self._catalog.versions(name)
        if not _texts(self._catalog, name):
            versions[-1].must_be_text()
        aliases = [
            {"alias": alias, "version": str(each.version.number)}
            for each in versions
            for alias in each.aliases
        ]
        return {
            "name": name,
            "creation_timestamp": _milliseconds(versions[0].version.at),
            "last_updated_timestamp": _milliseconds(self._catalog.updated(name)),
            "tags": [_IS_PROMPT],
            "aliases": aliases,
            "latest_versions": [],
        }


def _texts(catalog: Catalog, name: str) -> list[CatalogVersion]:
    return [each for each in catalog.versions(name) if each.text is not None]


def _config(found: CatalogVersion) -> dict[str, Any]:
    return {"rlprompt": {"hash": found.version.prompt, "base": found.base}}


def _fits(found: CatalogVersion, given: dict[str, str]) -> bool:
    """Whether a version is among those that a list is asked for."""
    at = _time(found.version.at, "at")
    since, until = _time(given.get("fromUpdatedAt"), ""), _time(given.get("toUpdatedAt"), "")
    return (
        ("label" not in given or given["label"] in found.aliases)
        and ("tag" not in given or given["tag"] in found.version.tags)
        and ("version" not in given or int(given["version"]) == found.version.number)
        and (since is None or at is None or at >= since)
        and (until is None or at is None or at < until)
    )


def _time(value: str | None, name: str) -> datetime.datetime | None:
    if value is None:
        return None
    try:
        found = datetime.datetime.fromisoformat(value)
    except ValueError as error:
        raise Refusal(400, f"{name} is no time of ISO 8601; correct it", param=name) from error
    return found if found.tzinfo is not None else found.replace(tzinfo=datetime.UTC)


def _milliseconds(at: str) -> int:
    return int(datetime.datetime.fromisoformat(at).timestamp() * 1000)


def _needed(request: Request, *names: str) -> dict[str, str]:
    given = read_query(request, names)
    for name in names:
        if name not in given:
            raise Refusal(400, f"the parameter {name} is missing; give it", param=name)
    return given


def _model_version(found: CatalogVersion) -> dict[str, Any]:
    at = _milliseconds(found.version.at)
    tags = {
        "mlflow.prompt.is_prompt": "true",
        "mlflow.prompt.text": found.must_be_text(),
        "_mlflow_prompt_type": "text",
        "rlprompt.hash": found.version.prompt,
        "rlprompt.base": found.base,
        **({"rlprompt.tags": ",".join(found.version.tags)} if found.version.tags else {}),
    }
    return {
        "name": found.name,
        "version": str(found.version.number),
        "creation_timestamp": at,
        "last_updated_timestamp": at,
        "user_id": found.version.by,
        "current_stage": "None",
        "description": found.version.message,
        "status": "READY",
        "tags": [{"key": key, "value": value} for key, value in tags.items()],
        "aliases": list(found.aliases),
    }


def _filter(text: str) -> Callable[[str], bool]:
    """What a filter of MLflow's keeps, of the clauses that its prompt clients send.

    Raises:
        Refusal: 400, it has another clause.
    """
    checks: list[Callable[[str], bool]] = []
    for clause in re.split(r"\s+AND\s+", text.strip(), flags=re.IGNORECASE) if text else ():
        if is_prompt := _IS_PROMPT_CLAUSE.fullmatch(clause.strip()):
            wanted = is_prompt[1] == "="
            checks.append(lambda _name, wanted=wanted: wanted)  # type: ignore[misc]
        elif by_name := _NAME_CLAUSE.fullmatch(clause.strip()):
            checks.append(_name_check(by_name[1].lower(), by_name[2]))
        else:
            raise Refusal(
                400,
                f"the clause {clause[:80]!r} of the filter is not known here; ask for a name with "
                "=, !=, LIKE or ILIKE",
                param="filter",
            )
    return lambda name: all(check(name) for check in checks)


def _is_backwards(order: str) -> bool:
    """Whether what is in the order of names and versions is wanted the other way round.

    Raises:
        Refusal: 400, another order is wanted.
    """
    found = re.fullmatch(r"(name|version_number)(\s+(asc|desc))?", order.strip(), re.IGNORECASE)
    if order and found is None:
        raise Refusal(
            400, "order_by is neither name nor version_number, ASC or DESC; correct it",
            param="order_by",
        )  # fmt: skip
    return found is not None and (found[3] or "").lower() == "desc"


def _name_check(comparison: str, value: str) -> Callable[[str], bool]:
    if comparison in ("=", "!="):
        return lambda name: (name == value) == (comparison == "=")
    folded = (lambda text: text.lower()) if comparison == "ilike" else str
    return lambda name: _like(folded(name), folded(value))


def _like(text: str, pattern: str) -> bool:
    """Whether a text is as a pattern of SQL's LIKE says; time is the product of their lengths."""
    fits = [True] + [False] * len(text)  # whether the pattern so far is the text up to there
    for char in pattern:
        if char == "%":
            fits = list(itertools.accumulate(fits, operator.or_))
        else:
            fits = [False] + [
                before and char in ("_", each) for before, each in zip(fits, text, strict=False)
            ]
    return fits[-1]


def _langfuse_error(refusal: Refusal) -> dict[str, str]:
    names = {401: "UnauthorizedError", 403: "ForbiddenError", 404: "LangfuseNotFoundError"}
    kind = "InternalServerError" if refusal.status >= 500 else "InvalidRequestError"
    return {"message": refusal.sentence, "error": names.get(refusal.status, kind)}


def _mlflow_error(refusal: Refusal) -> dict[str, str]:
    codes = {
        401: "UNAUTHENTICATED",
        403: "PERMISSION_DENIED",
        404: "RESOURCE_DOES_NOT_EXIST",
        429: "REQUEST_LIMIT_EXCEEDED",
        503: "TEMPORARILY_UNAVAILABLE",
    }
    return {
        "error_code": codes.get(refusal.status, "INVALID_PARAMETER_VALUE"),
        "message": refusal.sentence,
    }
