"""The surface of the command line: its names are a promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from rlprompt import __version__
from rlprompt.cli import app
from tests.cli.runs import rlprompt

JSON_SCHEMA_KEYWORDS = {
    "$schema",
    "$defs",
    "$ref",
    "title",
    "description",
    "default",
    "type",
    "enum",
    "const",
    "anyOf",
    "oneOf",
    "discriminator",  # an annotation of OpenAPI; validators pass over it
    "properties",
    "required",
    "additionalProperties",
    "items",
    "prefixItems",
    "minItems",
    "maxItems",
    "minLength",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
}


def surface() -> dict[str, list[str]]:
    """Command -> its arguments and options."""
    root: Any = typer.main.get_command(app)
    commands = dict(root.commands)
    groups = {name: each for name, each in commands.items() if hasattr(each, "commands")}
    for group, each in groups.items():
        del commands[group]
        commands |= {f"{group} {name}": command for name, command in each.commands.items()}
    return {
        name: [parameter.opts[0] for parameter in command.params if parameter.name != "help"]
        for name, command in commands.items()
    }


def test_commands_and_options_are_those_of_the_design() -> None:
    assert surface() == {
        "train": ["recipe", "overrides", "--output", "--resume", "--verbose"],
        "chat": [
            "artifact",
            "--compare",
            "--model",
            "--force",
            "--max-tokens",
            "--temperature",
            "--seed",
            "--query",
            "--trust-remote-code",
            "--verbose",
        ],
        "model fetch": ["name", "--verbose"],
        "model list": [],
        "schema": ["--output"],
        "doctor": ["--json"],
    }


def test_version() -> None:
    assert rlprompt("--version").out == f"rlprompt {__version__}\n"


def test_an_unknown_command_or_option_is_a_usage_error() -> None:
    assert rlprompt("trian", "recipe.yaml").code == 2
    shown = rlprompt("train", "recipe.yaml", "--steps", "3")
    assert shown.code == 2
    assert "No such option: --steps" in shown.err


def test_the_entry_point_of_the_process_tells_wrong_input_in_one_line(tmp_path: Path) -> None:
    code = "from rlprompt.cli import main; main()"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
    )
    sentence = f"error: recipe '{tmp_path}' is a folder; name the YAML file in it\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)


def schema_errors(node: Any, root: dict[str, Any], place: str) -> list[str]:
    """What draft 2020-12 does not know, or does not resolve, below a node."""
    errors = [f"{place}: {key}" for key in node if key not in JSON_SCHEMA_KEYWORDS]
    if "$ref" in node and node["$ref"].removeprefix("#/$defs/") not in root["$defs"]:
        errors.append(f"{place}: {node['$ref']}")
    properties = node.get("properties", {})
    errors += [
        f"{place}: requires {key}" for key in node.get("required", ()) if key not in properties
    ]
    children = {
        **{f"{place}.{key}": value for key, value in properties.items()},
        **{f"{place}/{key}": value for key, value in node.get("$defs", {}).items()},
    }
    for key in ("anyOf", "oneOf", "prefixItems"):
        children |= {f"{place}/{key}{i}": value for i, value in enumerate(node.get(key, ()))}
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            children[f"{place}/{key}"] = node[key]
    for name, value in children.items():
        errors += schema_errors(value, root, name)
    return errors


def test_the_schema_is_of_draft_2020_12_and_describes_every_key(tmp_path: Path) -> None:
    shown = rlprompt("schema")
    schema = json.loads(shown.out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema_errors(schema, schema, "recipe") == []
    for node in (schema, *schema["$defs"].values()):
        assert node["additionalProperties"] is False
        for key, value in node["properties"].items():
            assert value.get("description"), f"{node['title']}.{key}"
    assert rlprompt("schema", "--output", tmp_path / "recipe.json").out == ""
    assert (tmp_path / "recipe.json").read_text() == shown.out


def test_a_schema_file_in_no_folder_is_wrong_input(tmp_path: Path) -> None:
    shown = rlprompt("schema", "--output", tmp_path / "absent" / "recipe.json")
    assert shown.code == 2
    assert "cannot be written" in shown.err


def test_model_list_says_what_is_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLPROMPT_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    lines = rlprompt("model", "list").out.splitlines()
    assert lines[0].split() == ["name", "download", "fetched", "licence", "path"]
    expected = ["smollm2-135m", "93", "MB", "no", "Apache-2.0"]
    assert lines[1].split() == [*expected, str(tmp_path / "models" / "smollm2-135m")]


def test_model_fetch_of_an_unknown_name_suggests_one() -> None:
    shown = rlprompt("model", "fetch", "smolm2-135m")
    assert shown.code == 2
    assert "did you mean 'smollm2-135m'?" in shown.err


@pytest.mark.model
def test_model_fetch_prints_the_folder(smollm2_dir: Path) -> None:
    shown = rlprompt("model", "fetch", "smollm2-135m")
    assert (shown.code, shown.out) == (0, f"{smollm2_dir}\n")
