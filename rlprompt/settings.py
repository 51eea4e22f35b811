"""The base of every typed setting in a recipe."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema


def _make_scalars_strict(node: Any) -> None:
    # Only these: `strict` on the whole class would refuse YAML's lists where a tuple is wanted.
    if isinstance(node, dict):
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
