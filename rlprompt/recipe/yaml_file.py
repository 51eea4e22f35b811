"""From the text of a recipe to plain values, and from what is wrong in it to one sentence.

How strictly YAML is read is told in `rlprompt.reading.yaml_text`. What the settings classes object
to is explained with the YAML path and, for a name, the nearest one that exists.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlprompt.errors import InputError, quote
from rlprompt.reading import yaml_text
from rlprompt.reading.files import read_text, reason
from rlprompt.recipe.hints import elsewhere, foreign_hint, kind_hint, other_type

Schema = Mapping[str, Any]
"""A JSON schema, or a node of one."""

_NEEDS = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (put it in quotes)",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "list_type": "a list (begin each entry with '- ')",
    "tuple_type": "a list (begin each entry with '- ')",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "text of at least {min_length} character(s)",
}
"""What a value must be, by pydantic's error type."""

_WRONG_KEY = ("extra_forbidden", "invalid_key")
_INDEX_DIGITS = 9


def read_tree(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: the file is not there, cannot be read, or is not a YAML mapping.
    """
    if path.is_dir():
        raise InputError(f"recipe '{path}' is a folder; name the YAML file in it")
    try:
        tree = yaml_text.load(read_text(path))
    except FileNotFoundError as error:
        raise InputError(f"recipe '{path}' does not exist; {_neighbour(path)}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"recipe '{path}' is not UTF-8 text; save it with that encoding"
        ) from error
    except OSError as error:
        raise InputError(
            f"recipe '{path}' cannot be read ({reason(error)}); check the file and its permissions"
        ) from error
    except yaml.YAMLError as error:
        raise InputError(f"recipe '{path}' is not valid YAML: {yaml_text.reason(error)}") from error
    if not isinstance(tree, dict):
        raise InputError(
            f"recipe '{path}' is not a mapping of keys; begin with 'name:', see docs/recipe.md"
        )
    return tree


def _neighbour(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean '{path.parent / near[0]}'?" if near else "check the path"


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in a tree, in place; the value is parsed as YAML.

    Entries of lists are named by their index. Keys that are not there are made; whether they may be
    is for the settings classes to say.

    Raises:
        InputError: it is not of that form, or the path leads through a plain value or past a list.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override '{override}' is not of the form key=value; write one")
    try:
        value = yaml_text.load(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"override '{override}' has a value that is not YAML "
            f"({yaml_text.problem(error)}); put it in quotes"
        ) from error
    set_value(tree, key.strip(), value, f"override '{override}'")


def merge(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with nested changes; neither is touched.

    A mapping is merged into the mapping in its place, unless it says that its `type` is another:
    then it takes the place. Anything else takes the place of what was there.
    """
    merged = dict(tree)
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            same = value.get("type", before.get("type")) == before.get("type")
            value = merge(before, value) if same else value
        merged[key] = value
    return merged


def set_value(tree: dict[str, Any], key: str, value: Any, who: str) -> None:
    """Set a dotted key in a tree, in place; see `apply_override`.

    Args:
        tree: the tree of a recipe.
        key: the dotted key.
        value: a plain value.
        who: the one who asks for it, for errors.

    Raises:
        InputError: the path leads through a plain value or past a list.
    """
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[_place(node, part, who)]
    node[_place(node, last, who)] = value


def _place(node: Any, part: str, who: str) -> Any:
    """The key or index under which a mapping or list holds `part`."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise InputError(f"{who} looks for '{part}' below a plain value; check the key")
    if not part.isdecimal() or len(part) > _INDEX_DIGITS or int(part) >= len(node):
        last = f"the entries are 0 to {len(node) - 1}" if node else "the list is empty"
        raise InputError(f"{who}: {quote(part)} is not an index; {last}")
    return int(part)


def explain(error: ValidationError, schema: Schema) -> tuple[str, str]:
    """The first thing that the settings classes object to; unknown keys come before all else.

    Args:
        error: the error that the class of `schema` raised.
        schema: the JSON schema of that class.

    Returns:
        The YAML path, such as `rewards.0.weight`, and one sentence that names it.
    """
    # A list of which every entry is wrong is not also too short.
    wrong = error.errors()
    problems = [p for p in wrong if p["type"] != "too_short"] or wrong
    first = next((p for p in problems if p["type"] in _WRONG_KEY), problems[0])
    place, node = _follow(first["loc"], schema)
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    return place, _sentence(first, place, node, schema) + more


def _sentence(problem: Any, place: str, node: Schema, schema: Schema) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        _, parent = _follow(problem["loc"][:-1], schema)
        known = list(parent.get("properties", {}))
        name = str(problem["loc"][-1])
        if kind_key := other_type(place, schema):
            return (
                f"unknown key '{place}', which another {kind_key} has; known keys: "
                f"{', '.join(known)}"
            )
        meant = foreign_hint(name, schema) or elsewhere(name, place, schema)
        return f"unknown key '{place}'; {meant or _nearest(name, known, 'known keys: ')}"
    if kind == "missing":
        return f"'{place}' is missing; add it"
    if kind == "invalid_key":
        return f"the key {place} is not text; put it in quotes or remove it"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = [tag for option in _options(node, schema) if (tag := _tag(option))]
        if kind == "union_tag_not_found":
            return f"'{place}.type' is missing; add one of {', '.join(tags)}"
        tag = context["tag"]
        hint = kind_hint(tag, tags)  # "dapo" is no misspelt "dpo"
        advice = f"use {', '.join(tags)}{hint}" if hint else _nearest(tag, tags, "use ")
        return f"'{place}.type' is {tag!r}; {advice}"
    if kind in _NEEDS:
        need = _NEEDS[kind].format(**context)
        return f"'{place}' must be {need}, given {_shown(problem['input'])}"
    if kind == "literal_error":
        choices = [str(each) for each in node.get("enum", [node.get("const")])]
        given = _shown(problem["input"])
        return f"'{place}' is {given}; {_nearest(problem['input'], choices, 'use one of ')}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"'{place}': {message}" if place else str(message)


def _follow(location: Sequence[int | str], schema: Schema) -> tuple[str, Schema]:
    """The YAML path of a place, and its schema. Tags of unions are no part of the path."""
    parts: list[str] = []
    node = _resolved(schema, schema)
    for part in location:
        tagged = {_tag(option): option for option in _options(node, schema)}
        if part in tagged:
            node = tagged[str(part)]
            continue
        if isinstance(part, int) and "items" in node:
            node = node["items"]
        else:
            node = node.get("properties", {}).get(part, {})
        parts.append(str(part))
        node = _resolved(node, schema)
    return ".".join(parts), node


def _resolved(node: Schema, schema: Schema) -> Schema:
    """A node without indirections: what `$ref` points to, what may be null beside null."""
    while True:
        choices = [each for each in node.get("anyOf", ()) if each.get("type") != "null"]
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        elif len(choices) == 1:
            node = choices[0]
        else:
            return node


def _options(node: Schema, schema: Schema) -> list[Schema]:
    """The members of a tagged union; none for any other node."""
    return [_resolved(option, schema) for option in node.get("oneOf", ())]


def _tag(option: Schema) -> str:
    return str(option.get("properties", {}).get("type", {}).get("const", ""))


def _nearest(wrong: object, known: Sequence[str], otherwise: str) -> str:
    near = _close(wrong, known)
    if near:
        return f"did you mean {near}?"
    return otherwise + ", ".join(known) if known else "remove it"


def _close(wrong: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(wrong).lower(), known, n=1)
    return f"'{near[0]}'" if near else ""


def _shown(value: object) -> str:
    text = " ".join(repr(value)[:240].split())
    return text if len(text) <= 60 else f"{text[:57]}..."
