"""The base of every typed setting in a recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A node of the recipe tree: immutable, and an unknown key is an error.

    Every settings class lives beside the class it configures; a docstring under each field becomes
    its description in `rlprompt schema`.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
    )
