"""The base of every typed setting in a recipe, and settings of a part that is chosen by `type`."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    create_model,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

UserClass = type[Any]
"""A class that a path in a recipe names."""
EXTENSIBLE = "x-extensible"
"""Mark in a JSON schema: `type` may also be the path of a class of the user's own. Its value is the
type where none is given, or empty."""


_WORDS: Mapping[bool | None, tuple[str, ...]] = {
    True: ("on", "yes", "true"),
    False: ("off", "no", "false"),
    None: ("null",),
}
"""What YAML 1.1 reads a bare word as -> the words that it may have been."""


class _Words:
    """Gives a field back the word that YAML has read as a truth value, if it is one of its own.

    `model.cpu_kernels=off` is False to YAML 1.1.
    """

    def __init__(self, choices: Iterable[Any]) -> None:
        known = {value: [w for w in words if w in choices] for value, words in _WORDS.items()}
        self.meant = {value: words[0] for value, words in known.items() if words}

    def __call__(self, value: Any) -> Any:
        is_read = value is None or isinstance(value, bool)
        return self.meant.get(value, value) if is_read else value


def _take_words(node: dict[str, Any]) -> None:
    """Let a field that is one of several words take those that YAML reads as something else."""
    words = _Words(node["expected"])
    if words.meant:
        inner = dict(node)
        node.clear()
        node.update(core_schema.no_info_before_validator_function(words, inner))


_LONGEST_NAME = 120
"""Bytes of a name in UTF-8; file systems take 255, and suffixes need room."""
LARGEST_INTEGER = 2**31 - 1
"""Limit, in both directions, of every integer whose field states none."""


def folder_problem(name: str) -> str:
    """Why a name cannot be that of a folder, as the rest of a sentence; empty when it can.

    Args:
        name: name that a user gave.
    """
    return "holds a slash" if "/" in name or "\\" in name else _name_problem(name)


def _name_problem(name: str) -> str:
    if not name.strip(". "):
        return "is no name"
    if name != name.strip():
        return "begins or ends with white space"
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        return "holds a control character"
    if len(name.encode()) > _LONGEST_NAME:
        return f"is longer than {_LONGEST_NAME} bytes"
    return ""


def _checked_name(name: str) -> str:
    problem = _name_problem(name)
    if problem:
        raise ValueError(f"{name[:40]!r} {problem}; write a short one of letters and digits")
    return name


Name = Annotated[str, Field(min_length=1), AfterValidator(_checked_name)]
"""A name that folders, logs and trackers can carry."""


def _bound_scalars(node: Any) -> None:
    """Have numbers and booleans read from their own type only, and integers be bounded."""
    # Only these: `strict` on the whole class would refuse YAML's lists where a tuple is wanted.
    if isinstance(node, list):
        for child in node:
            _bound_scalars(child)
    if not isinstance(node, dict) or _takes_words(node):
        return
    if node.get("type") == "literal":
        _take_words(node)
        return
    if node.get("type") in ("int", "float", "bool"):
        node["strict"] = True
    if node.get("type") == "int":
        _bound_integer(node)
    for key, child in node.items():
        if key not in ("default", "metadata"):
            _bound_scalars(child)


def _takes_words(node: Mapping[str, Any]) -> bool:
    """Whether `_take_words` has changed a node."""
    function = node.get("function")
    return isinstance(function, dict) and isinstance(function.get("function"), _Words)


def _bound_integer(node: dict[str, Any]) -> None:
    if not node.keys() & {"le", "lt"}:
        node["le"] = LARGEST_INTEGER
    if not node.keys() & {"ge", "gt"}:
        node["ge"] = -LARGEST_INTEGER


def _leave_out_bounds(node: Any) -> None:
    """Take the bounds that every integer has out of a JSON schema, where they say nothing."""
    if isinstance(node, dict):
        for key, limit in (("maximum", LARGEST_INTEGER), ("minimum", -LARGEST_INTEGER)):
            if node.get(key) == limit:
                del node[key]
        for child in node.values():
            _leave_out_bounds(child)
    elif isinstance(node, list):
        for child in node:
            _leave_out_bounds(child)


class Settings(BaseModel):
    """A node of the recipe tree: immutable, and an unknown key is an error.

    Every settings class lives beside the class it configures; a docstring under each field becomes
    its description in `rlprompt schema`. Numbers and booleans are never read from a value of
    another type (pydantic would take `true` and "1" for 1); an integer is a float too. An integer
    whose field states no bound has 31 bits and a sign: nothing that is counted here needs more.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema = handler(source)
        _bound_scalars(schema)
        return schema

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        described = handler(schema)
        _leave_out_bounds(handler.resolve_ref_schema(described).get("properties"))
        return described


class ChosenSettings(Settings):
    """Settings of a part that a recipe chooses by `type`.

    Built-in parts narrow `type` to their name. A class of the user's own leaves it alone: under the
    path that names the class in a recipe, `chosen_as` narrows it to that path.
    """

    type: str = ""
    """What is chosen."""
    user_class: ClassVar[UserClass | None] = None
    """The class of the user's own that `type` is the path of; None for what is built in."""


def chosen_as(path: str, user_class: UserClass) -> type[ChosenSettings]:
    """The settings of a class of the user's own, as a recipe gives them under its path.

    Args:
        path: what `type` says in the recipe.
        user_class: the class that the path names, with its `Settings`.
    """
    settings: type[ChosenSettings] = user_class.Settings
    kind: Any = Literal[path]
    made = create_model(settings.__name__, __base__=settings, type=(kind, path))
    made.__doc__ = settings.__doc__
    made.user_class = user_class
    return made


class OneOf:
    """Annotation of a field: the settings of one of several parts, told apart by `type`.

    `Annotated[AlgorithmSettings, OneOf({"grpo": GRPO.Settings, ...}, default="grpo")]` is read as
    pydantic's tagged union of those settings, so that a new part is one entry of a dict.
    """

    def __init__(
        self,
        choices: Mapping[str, type[ChosenSettings]],
        *,
        default: str = "",
        names: Iterable[str] = (),
        is_extensible: bool = True,
    ) -> None:
        """Keep the choices.

        Args:
            choices: settings by the name, or path, that `type` gives.
            default: choice where a mapping has no `type`; "" = `type` must be there.
            names: choices that are given as a plain name; with them, a choice that leaves all its
                settings at their defaults may be given as its plain name too.
            is_extensible: whether `type` may be the path of a class of the user's own.
        """
        self._is_extensible = is_extensible
        self._choices = dict(choices)
        self._default = default
        self._names = list(names)

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        options = {name: handler.generate_schema(each) for name, each in self._choices.items()}
        if not self._names:
            union = core_schema.tagged_union_schema(options, "type")
        else:
            plain = core_schema.literal_schema(self._names)
            if not options:
                return plain
            union = core_schema.tagged_union_schema({_PLAIN: plain, **options}, _tag)
        return core_schema.no_info_before_validator_function(self._as_mapping, union)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        described = handler(schema)
        return {**described, EXTENSIBLE: self._default} if self._is_extensible else described

    def _as_mapping(self, value: object) -> object:
        """What stands for a mapping with `type`, as that mapping."""
        if isinstance(value, dict) and self._default:
            return {"type": self._default, **value}
        if isinstance(value, str) and self._names and value in self._choices:
            return {"type": value}
        return value


_PLAIN = ""
"""The tag of a plain name."""


def _tag(value: Any) -> Any:
    """What tells a plain name from a mapping, or settings, with `type`."""
    if isinstance(value, dict):
        return value.get("type")
    return value.type if isinstance(value, ChosenSettings) else _PLAIN
