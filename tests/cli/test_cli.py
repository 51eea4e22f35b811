"""The surface of the command line: its names are a promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from jsonschema import Draft202012Validator

from rlprompt import __version__
from rlprompt.cli.commands.schema import recipe_schema
from rlprompt.cli.main import app
from rlprompt.recipe.schema import load_recipe
from rlprompt.recipe.yaml_file import apply_override, read_tree
from tests.cli.runs import rlprompt

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(p for p in FOLDER.rglob("*.y*ml") if p.parent.name != "reward_models")


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
        "artifact sign": ["artifact", "--key"],
        "artifact verify": ["artifact", "--key", "--json"],
        "artifact migrate": ["artifact", "--output"],
        "export": [
            "artifact",
            "--to",
            "--output",
            "--model",
            "--force",
            "--trust-remote-code",
            "--prompt-class",
            "--verbose",
        ],
        "registry add": ["artifact", "name", "--message", "--tag", "--registry"],
        "registry list": ["--tag", "--registry", "--json"],
        "registry show": ["reference", "--registry", "--json"],
        "registry diff": ["one", "other", "--registry", "--json"],
        "registry promote": [
            "name",
            "alias",
            "versions",
            "--why",
            "--force",
            "--remove",
            "--registry",
        ],
        "registry protect": [
            "name",
            "alias",
            "--verdict",
            "--certificate",
            "--reward",
            "--registry",
        ],
        "registry rollback": ["name", "alias", "--why", "--registry"],
        "registry history": ["name", "alias", "--registry", "--json"],
        "registry push": ["reference", "to", "--registry"],
        "registry pull": ["source", "reference", "--name", "--registry"],
        "train": [
            "recipe",
            "overrides",
            "--output",
            "--resume",
            "--auto-resume",
            "--stop-exit-code",
            "--verbose",
        ],
        "resume": ["run", "overrides", "--stop-exit-code", "--verbose"],
        "submit": [
            "recipe",
            "overrides",
            "--output",
            "--cluster",
            "--nodes",
            "--gpus-per-node",
            "--tasks-per-node",
            "--time",
            "--account",
            "--partition",
            "--qos",
            "--constraint",
            "--sweep",
            "--max-parallel",
            "--then",
            "--after",
            "--server",
            "--server-nodes",
            "--dry-run",
            "--wait",
            "--status",
        ],
        "init": ["folder", "--target"],
        "plan": [
            "recipe",
            "overrides",
            "--model-size",
            "--model",
            "--gpus",
            "--gpu",
            "--gpus-per-node",
            "--network",
            "--query-tokens",
            "--json",
        ],
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
            "--prompt-class",
            "--json",
            "--verbose",
        ],
        "eval": [
            "arguments",
            "--recipe",
            "--set",
            "--output",
            "--suite",
            "--gate",
            "--force",
            "--verbose",
        ],
        "model convert": ["file", "name", "--dtype", "--force", "--verbose"],
        "model fetch": ["name", "--verbose"],
        "model list": ["--json"],
        "reward check": ["path", "--option", "--column", "--pairs", "--timeout"],
        "forecast": [
            "recipe",
            "overrides",
            "--queries",
            "--completions",
            "--texts",
            "--difference",
            "--json",
            "--verbose",
        ],
        "reward train": ["recipe", "overrides", "--output", "--verbose"],
        "reward serve": [
            "path",
            "--option",
            "--host",
            "--port",
            "--token-env",
            "--no-token",
            "--certificate",
            "--max-body-mb",
            "--timeout",
            "--isolate",
            "--verbose",
        ],
        "serve": [
            "prompts",
            "--model",
            "--host",
            "--port",
            "--keys",
            "--certificate",
            "--engine",
            "--vllm-url",
            "--vllm-wait",
            "--dtype",
            "--reward",
            "--monitor",
            "--monitor-limit",
            "--monitor-delta",
            "--monitor-share",
            "--fails-above",
            "--fails-below",
            "--rollback",
            "--max-rows",
            "--max-positions",
            "--max-waiting",
            "--max-tokens",
            "--max-body-mb",
            "--deadline",
            "--drain",
            "--follow",
            "--registry",
            "--log-requests",
            "--force",
            "--trust-remote-code",
            "--prompt-class",
            "--verbose",
        ],
        "certify": [
            "artifacts",
            "--reward",
            "--alpha",
            "--delta",
            "--recipe",
            "--data",
            "--split",
            "--where",
            "--fails-above",
            "--fails-below",
            "--candidates",
            "--num-compared",
            "--in-sequence",
            "--judge-labels",
            "--shift",
            "--groups",
            "--completions",
            "--seed",
            "--option",
            "--model",
            "--prompt-class",
            "--trust-remote-code",
            "--verify",
            "--json",
            "--verbose",
        ],
        "inspect": [
            "artifact",
            "--output",
            "--model",
            "--queries",
            "--reward",
            "--against",
            "--sentences",
            "--library",
            "--triggers",
            "--word",
            "--reward-sets",
            "--minutes",
            "--max-queries",
            "--seed",
            "--force",
            "--trust-remote-code",
            "--prompt-class",
            "--json",
            "--verbose",
        ],
        "compare": ["runs", "--output", "--json"],
        "schema": ["--output", "--artifact"],
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
    code = "from rlprompt.cli.main import main; main()"
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


def test_the_schema_is_of_draft_2020_12_and_describes_every_key(tmp_path: Path) -> None:
    shown = rlprompt("schema")
    schema = json.loads(shown.out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)
    for node in (schema, *schema["$defs"].values()):
        assert node["additionalProperties"] is False
        for key, value in node["properties"].items():
            assert value.get("description"), f"{node['title']}.{key}"
    assert rlprompt("schema", "--output", tmp_path / "recipe.json").out == ""
    assert (tmp_path / "recipe.json").read_text() == shown.out


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_schema_accepts_our_recipes(path: Path) -> None:
    validator = Draft202012Validator(recipe_schema())
    tree = read_tree(path)
    assert list(validator.iter_errors(tree)) == []
    resolved = json.loads(json.dumps(load_recipe(path).plain()))
    assert list(validator.iter_errors(resolved)) == []


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("training.stepz=3", "training"),
        ("training.steps=many", "training.steps"),
        ("prompt.num_virtual_tokens=true", "prompt.num_virtual_tokens"),
        ("algorithm.group_size=1", "algorithm.group_size"),
        ("model.dtype=bf16", "model.dtype"),
        ("reference={type: text}", "reference"),
    ],
)
def test_the_schema_refuses_what_a_recipe_does(override: str, place: str) -> None:
    tree = read_tree(FOLDER / "concise" / "smollm2_grpo.yaml")
    apply_override(tree, override)
    (error,) = Draft202012Validator(recipe_schema()).iter_errors(tree)
    assert error.json_path == f"$.{place}"


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
