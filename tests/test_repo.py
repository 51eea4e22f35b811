"""What the repository promises about itself: recipes load, scripts parse, sizes and pins hold."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import size

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.y*ml"))
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
MODULES = sorted((ROOT / "rlprompt").rglob("*.py"))
COMMANDS = [
    path
    for folder in ("benchmarks", "benchmarks/peers", "experiments", "scripts")
    for path in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


def read(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def pins() -> dict[str, str]:
    lines = read("constraints.txt").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_readme_names_both_scripts() -> None:
    readme = read("README.md")
    assert "bash scripts/quickstart.sh" in readme
    assert "bash scripts/test.sh" in readme


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=short)
def test_every_recipe_loads(path: Path) -> None:
    from rlprompt.recipe.schema import load_recipe
    from rlprompt.reward_training.settings import load_reward_recipe

    load = load_reward_recipe if path.parent.name == "reward_models" else load_recipe
    assert load(path).name


@pytest.mark.parametrize("path", SCRIPTS, ids=short)
def test_every_script_parses(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=20)
    assert checked.returncode == 0, checked.stderr


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a folder, without what this process has on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", COMMANDS, ids=short)
def test_every_command_answers_help(path: Path, tmp_path: Path) -> None:
    """From any folder; the sides of a comparison are modules and are run from the root."""
    if path.parent.name == "peers":
        shown = run_python(ROOT, "-m", f"benchmarks.peers.{path.stem}", "--help")
    else:
        shown = run_python(tmp_path, str(path), "--help")
    if shown.stderr.endswith("]'`\n") and "is not installed; run" in shown.stderr:
        pytest.skip(shown.stderr)
    assert shown.returncode == 0, shown.stderr
    assert f"usage: {path.name}" in shown.stdout


@pytest.mark.parametrize(
    ("command", "package", "advice"),
    [
        ("benchmarks/aot_report.py", "triton", "pip install 'rlprompt[triton]'"),
        ("benchmarks/peers/trl_grpo.py", "trl", "pip install 'rlprompt[trl]'"),
        ("benchmarks/peers/vllm_generate.py --model M --queries Q", "vllm", "vllm_generate.py"),
        ("experiments/make_reasoning_data.py sum --output F", "reasoning_gym", "'rlprompt[rules]'"),
        ("benchmarks/structure.py --part package", "pytest", "pip install 'rlprompt[dev]'"),
    ],
)
def test_a_missing_extra_is_named_in_one_sentence(command: str, package: str, advice: str) -> None:
    arguments = command.split()
    code = (
        "import runpy, sys\n"
        f"sys.modules[{package!r}], sys.argv = None, {arguments}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    shown = run_python(ROOT, "-c", code)
    assert shown.returncode == 1
    assert shown.stderr.count("\n") == 1 and advice in shown.stderr, shown.stderr


def test_no_file_is_too_long() -> None:
    assert [short(p) for p in MODULES if size.count_lines(p) > size.MAX_FILE_LINES] == []


def test_no_function_is_too_long() -> None:
    found = [f for path in MODULES for f in size.functions(path)]
    assert [str(f) for f in found if f.num_lines > size.MAX_FUNCTION_LINES] == []


def test_size_counts_lines_and_functions(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("class A:\n    @property\n    def f(self):\n        return 1\n\nx = 1\n")
    assert size.count_lines(path) == 6
    assert [(f.name, f.num_lines, f.first_line) for f in size.functions(path)] == [("f", 2, 3)]


def print_calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield f"{short(path)}:{node.lineno}"


def test_the_package_does_not_print() -> None:
    assert [call for path in MODULES for call in print_calls(path)] == []


def test_every_todo_names_an_issue() -> None:
    open_todo = re.compile(r"\b(TODO|FIXME)\b(?!\(#\d+\))")
    sources = [*MODULES, *sorted((ROOT / "reward_models").rglob("*.py"))]
    found = [
        f"{short(path)}:{number}"
        for path in sources
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if open_todo.search(line)
    ]
    assert found == []


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    unpinned = {"rlprompt", "triton", "vllm"}  # ourselves; torch's own; an environment of its own
    for text in [*project["dependencies"], *(r for group in extras.values() for r in group)]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name not in unpinned:
            assert requirement.specifier.contains(pins()[name]), text


def test_torch_is_pinned_without_a_build() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", pins()["torch"])


def test_pre_commit_and_constraints_have_the_same_ruff() -> None:
    versions = re.findall(r"ruff==([\w.]+)", read(".pre-commit-config.yaml"))
    assert versions and set(versions) == {pins()["ruff"]}


def test_types_are_checked_wherever_there_is_python() -> None:
    tool = tomllib.loads(read("pyproject.toml"))["tool"]
    shipped = tool["hatch"]["build"]["targets"]["sdist"]["include"]
    folders = {name for name in shipped if any((ROOT / name).rglob("*.py"))}
    assert folders == {path.name for files in tool["mypy"]["files"] for path in ROOT.glob(files)}


def test_only_the_package_is_installed() -> None:
    wheel = tomllib.loads(read("pyproject.toml"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["rlprompt"]
