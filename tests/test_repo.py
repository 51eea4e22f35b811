"""What the repository promises about itself: recipes load, scripts parse, sizes and pins hold."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.y*ml"))
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
MODULES = sorted((ROOT / "rlprompt").rglob("*.py"))


def read(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def size() -> ModuleType:
    spec = importlib.util.spec_from_file_location("size", ROOT / "scripts" / "size.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["size"] = module  # a dataclass looks its own module up
    spec.loader.exec_module(module)
    return module


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


def test_no_file_is_too_long(size: ModuleType) -> None:
    assert [short(p) for p in MODULES if size.count_lines(p) > size.MAX_FILE_LINES] == []


def test_no_function_is_too_long(size: ModuleType) -> None:
    found = [f for path in MODULES for f in size.functions(path)]
    assert [str(f) for f in found if f.num_lines > size.MAX_FUNCTION_LINES] == []


def test_size_counts_lines_and_functions(size: ModuleType, tmp_path: Path) -> None:
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


def test_only_the_package_is_installed() -> None:
    wheel = tomllib.loads(read("pyproject.toml"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["rlprompt"]
