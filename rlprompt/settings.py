"""The base of every typed setting in a recipe, and settings of a part that is chosen by `type`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
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


def _make_scalars_strict(node: Any) -> None:
    # Only these: `strict` on the whole class would refuse YAML's lists where a tuple is wanted.
    if isinstance(node, dict):
        if node.get("type") == "literal":
            _take_words(node)
            return
        if isinstance(node.get("function"), dict) and isinstance(
            node["function"].get("function"), _Words
        ):
            return
        if node.get("type") in ("int", "float", "bool"):
            node["strict"] = True
        for key, child in node.items():
            if key not in ("default", "metadata"):
                _make_scalars_strict(child)
    elif isinstance(node, list):
        for child in node:
            _make_scalars_strict(child)


class Settings(BaseModel):
    """A node of the recipe tree: immutable, and an unknown key is an error.

    Every settings class lives beside the class it configures; a docstring under each field becomes
    its description in `rlprompt schema`. Numbers and booleans are never read from a value of
    another type (pydantic would take `true` and "1" for 1); an integer is a float too.
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
        _make_scalars_strict(schema)
        return schema


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
    ) -> None:
        """Keep the choices.

        Args:
            choices: settings by the name, or path, that `type` gives.
            default: choice where a mapping has no `type`; "" = `type` must be there.
            names: choices that are given as a plain name; with them, a choice that leaves all its
                settings at their defaults may be given as its plain name too.
        """
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
        return {**handler(schema), EXTENSIBLE: self._default}

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
