"""`rlprompt schema`: the JSON schema of a recipe, or of an artifact's prompt.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rlprompt import __version__
from rlprompt.artifacts.format import artifact_schema
from rlprompt.errors import InputError
from rlprompt.files import write_atomic
from rlprompt.recipe.schema import Recipe
from rlprompt.settings import EXTENSIBLE

_PATH = {"type": "string", "pattern": r"\.py:|^[\w.]+:\w+"}
"""The path of a class of the user's own."""
_OWN = {"type": "object", "properties": {"type": _PATH}, "required": ["type"]}
"""Settings of such a class."""


def recipe_schema() -> dict[str, Any]:
    """The schema, draft 2020-12, with the description of every key."""
    schema = Recipe.model_json_schema()
    tree: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_told_by_type(schema),
        "title": "rlprompt recipe",
        "$comment": f"of rlprompt {__version__}; keys may differ in other versions",
    }
    return tree


def _told_by_type(node: Any) -> Any:
    """A schema in which `type` decides which alternative a mapping is held to.

    pydantic writes `oneOf`, under which a wrong key is wrong in every alternative and no validator
    can say where. An alternative that is the default also applies without a `type`. Where `type`
    may be the path of a class of the user's own, any keys may stand beside it: only a command that
    imports the class knows them.
    """
    if isinstance(node, list):
        return [_told_by_type(each) for each in node]
    if not isinstance(node, dict):
        return node
    node = {key: _told_by_type(value) for key, value in node.items()}
    default_type = node.pop(EXTENSIBLE, None)
    extensible = default_type is not None
    names: dict[str, str] | None = node.get("discriminator", {}).get("mapping")
    if names is None:
        return {"anyOf": [node, _PATH, _OWN]} if extensible else node
    default = (node.get("default") or {}).get("type") or default_type
    cases = []
    for name, reference in names.items():
        condition: dict[str, Any] = {"properties": {"type": {"const": name}}}
        if name != default:
            condition["required"] = ["type"]
        cases.append({"if": condition, "then": {"$ref": reference}})
    kept = {k: v for k, v in node.items() if k not in ("oneOf", "discriminator")}
    kind: dict[str, Any] = {"enum": list(names)}
    if extensible:
        kind = {"anyOf": [kind, _PATH]}
    whole = {"type": "object", "properties": {"type": kind}, "allOf": cases}
    return {**kept, **whole, **({} if default else {"required": ["type"]})}


def write_schema(output: Path | None, *, of_artifact: bool = False) -> None:
    """Write the schema to a file, or to stdout.

    Args:
        output: file to write; None = stdout.
        of_artifact: whether it is that of an artifact's prompt.json.

    Raises:
        InputError: the file cannot be written.
    """
    text = json.dumps(artifact_schema() if of_artifact else recipe_schema(), indent=2) + "\n"
    if output is None:
        sys.stdout.write(text)
        return
    try:
        write_atomic(output, text)
    except OSError as error:
        raise InputError(
            f"the schema cannot be written to '{output}' ({error.strerror}); name a file in a "
            "folder that exists and is writable"
        ) from error
