"""docs/recipe.md: every key of a recipe, from the JSON schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rlprompt.recipe.schema import Recipe
from tests.docs.pages import check_page, code

HEAD = """# Recipe reference

Every key that a recipe may hold, from the settings classes (`tests/docs/test_recipe_reference.py`
writes this page from `rlprompt schema`). A recipe must give the keys whose default is *required*;
any other key it may leave out. On the command line a key is changed with its dotted path, in which
entries of a list count from 0: `rlprompt train recipe.yaml training.steps=50 rewards.0.weight=2`.
"""
BOUNDS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
}


def resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """What `$ref` points to; the description beside the reference stays."""
    if "$ref" not in node:
        return node
    target = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return {**target, **{key: value for key, value in node.items() if key != "$ref"}}


def type_of(node: dict[str, Any], schema: dict[str, Any]) -> str:
    node = resolve(node, schema)
    if "const" in node:
        return json.dumps(node["const"])
    if "enum" in node:
        return " or ".join(json.dumps(value) for value in node["enum"])
    if "anyOf" in node:
        return " or ".join(type_of(each, schema) for each in node["anyOf"])
    if node.get("type") == "array":
        if "prefixItems" in node:
            return f"list of {len(node['prefixItems'])} numbers"
        inner = type_of(node.get("items", {}), schema)
        return f"list of {inner}" if inner else "list"
    names = {"object": "mapping", "string": "text", "boolean": "true or false"}
    name = names.get(node.get("type", ""), node.get("type", ""))
    bounds = ", ".join(text.format(node[key]) for key, text in BOUNDS.items() if key in node)
    return f"{name} {bounds}".strip()


def optional_part(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any] | None:
    """The mapping with known keys that a value is unless it is null."""
    parts = [resolve(each, schema) for each in node.get("anyOf", [])]
    return next((each for each in parts if "properties" in each), None)


def rows(
    node: dict[str, Any], schema: dict[str, Any], path: str
) -> Iterator[tuple[str, str, str, str]]:
    """Path, type, default and description of every key below a node."""
    for key, entry in node["properties"].items():
        place = f"{path}{key}"
        value = resolve(entry, schema)
        description = " ".join(entry.get("description", "").split())
        parts = [value, *(resolve(each, schema) for each in value.get("anyOf", []))]  # or null
        choices: list[Any] = next((each["oneOf"] for each in parts if "oneOf" in each), [])
        choices = choices or [part["then"] for part in value.get("allOf", []) if "then" in part]
        if choices and "anyOf" in value:
            yield place, "mapping or null", code("null"), description
        if "properties" in value and not choices:
            yield from rows(value, schema, f"{place}.")
        elif choices:
            for option in choices:
                target = resolve(option, schema)
                kind = target["properties"]["type"]["const"]
                kept = {k: v for k, v in target["properties"].items() if k != "type"}
                about = " ".join(target["description"].split())
                default = "default" if (entry.get("default") or {}).get("type") == kind else ""
                yield f"{place}.type", json.dumps(kind), default, about
                others = {"properties": kept, "required": target.get("required", [])}
                for path_, type_, default_, about_ in rows(others, schema, f"{place}."):
                    yield path_, type_, default_, f"With `type: {kind}`: {about_}"
        elif inner := optional_part(value, schema):
            yield place, type_of(value, schema), code("null"), description
            yield from rows(inner, schema, f"{place}.")
        elif "properties" in resolve(value.get("items", {}), schema):
            yield from rows(resolve(value["items"], schema), schema, f"{place}.N.")
        else:
            required = key in node.get("required", [])
            default = "*required*" if required else code(json.dumps(entry.get("default")))
            if "default" not in entry and not required:
                default = code("{}")
            yield place, type_of(value, schema), default, description


def reference() -> str:
    schema = Recipe.model_json_schema()
    parts = [HEAD]
    for key, entry in schema["properties"].items():
        part = {"properties": {key: entry}, "required": schema.get("required", [])}
        parts.append(f"## {key}\n\n{entry['description']}\n")
        table = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for path, kind, default, description in rows(part, schema, ""):
            cell = description.replace("|", "\\|")
            table.append(f"| {code(path)} | {kind} | {default} | {cell} |")
        parts.append("\n".join(table) + "\n")
    return "\n".join(parts)


def test_the_reference_of_recipe_keys_is_current() -> None:
    text = reference()
    assert code("rewards.N.weight") in text
    assert code("training.optimizer.lr_relative") in text
    check_page("recipe.md", text)
