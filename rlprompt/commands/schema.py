"""`rlprompt schema`: the JSON schema of a recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rlprompt.errors import InputError
from rlprompt.recipe import Recipe
from rlprompt.training.files import write_atomic


def recipe_schema() -> dict[str, Any]:
    """The schema, draft 2020-12, with the description of every key."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
        "title": "rlprompt recipe",
    }


def write_schema(output: Path | None) -> None:
    """Write the schema to a file, or to stdout.

    Raises:
        InputError: the file cannot be written.
    """
    text = json.dumps(recipe_schema(), indent=2) + "\n"
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
