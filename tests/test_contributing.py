"""CONTRIBUTING.md says that adding something touches one place: this adds each kind by doing so.

The examples of examples/extend, which a recipe names by path, become built in: one file each in a
copy of the package, one line in a dict, and the import of what stands there.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.cli.runs import with_changes
from tests.fixtures.tiny import save_tiny

ROOT = Path(__file__).parent.parent
ROW = re.compile(
    r"^\| (?:an? )?(?P<kind>[^|]+?) \| one file in `(?P<folder>[\w/]+)/`[^|]*"
    r"\| one line in `(?P<registry>\w+)` of `(?P<file>[\w/.]+)` \|$",
    re.MULTILINE,
)
VOWELS = '''
"""Reward: the share of vowels."""

from typing import Any

from rlprompt.rewards.base import Example
from rlprompt.rewards.rules.text import message_texts
from rlprompt.settings import Settings


class Vowels(Settings):
    """The share of vowels, in [0, 1]."""

    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """One value per completion."""
        texts = message_texts(completions)
        return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts]


EXAMPLES = [
    Example("Say a.", "aaa", True, 1.0),
    Example("Say a.", "xyz", False, 0.0, 0.0),
    Example("Say a.", "", False, 0.0, 0.0),
]
'''


@dataclass(frozen=True)
class Part:
    """What is added in a row of the table."""

    example: str
    """File of examples/extend; empty = the reward above."""
    class_name: str
    name: str
    """What a recipe says."""
    case: str = ""
    """File of tests/fixtures that gives a case to the contract tests, and the case."""
    settings: str = ""


PARTS = {
    "built-in reward": Part("", "Vowels", "vowels"),
    "algorithm": Part(
        "algorithm.py", "MaxRL", "maxrl", "algorithms.py",
        '"maxrl": {"type": "maxrl", "group_size": 4, "strength": 0.0},',
    ),
    "prompt representation": Part(
        "prompt.py", "LowRankPrompt", "low_rank", "prompts.py",
        '"low_rank": {"type": "low_rank", "init_text": TEXT},',
    ),
    "searcher": Part(
        "searcher.py", "Climb", "climb", "searches.py",
        '"climb": {"phrases": [["a", "b"], ["c"]]},',
    ),
    "engine": Part("engine.py", "TimedEngine", "timed"),
    "tracker": Part("tracker.py", "CsvTracker", "csv"),
}  # fmt: skip
"""By what the table calls it."""


def rows() -> dict[str, re.Match[str]]:
    """The rows of the table that name a dict, by kind."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return {row["kind"].removeprefix("a "): row for row in ROW.finditer(text)}


def built_in(part: Part) -> str:
    """The example as a module of the package: its imports from where things are, and its name."""
    if not part.example:
        return VOWELS
    source = (ROOT / "examples" / "extend" / part.example).read_text(encoding="utf-8")
    tree = ast.parse((ROOT / "rlprompt" / "extend.py").read_text(encoding="utf-8"))
    homes = {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    used = sorted(set(re.findall(r"\brl\.(\w+)", source)))
    imports = "".join(f"from {homes[name]} import {name}\n" for name in used)
    source = re.sub(r"\brl\.(\w+)", r"\1", source)
    source = source.replace(
        "import rlprompt.extend as rl\n", f"from typing import Literal\n{imports}"
    )
    field = f'    type: Literal["{part.name}"] = "{part.name}"\n    """What it is called."""\n'
    pattern = r'(class \w+Settings\(\w+\):\n    """[^"]*"""\n\n)'
    changed, count = re.subn(pattern, rf"\1{field}", source)
    assert count == 1
    return changed


def add(root: Path, part: Part, row: re.Match[str]) -> None:
    """Write the file, and register it as the table says."""
    module = part.example.removesuffix(".py") or "vowels"
    file = root / "rlprompt" / row["folder"] / f"my_{module}.py"
    file.write_text(built_in(part), encoding="utf-8")
    dotted = ".".join(file.relative_to(root).with_suffix("").parts)
    registry = root / "rlprompt" / row["file"]
    source = registry.read_text(encoding="utf-8")
    before = source.splitlines()
    entry = part.class_name if part.example else f'"{dotted}:{part.class_name}"'
    begin = re.search(rf"^{row['registry']}: .*= {{\n", source, re.MULTILINE)
    assert begin is not None, row["registry"]
    source = f'{source[: begin.end()]}    "{part.name}": {entry},\n{source[begin.end() :]}'
    if part.example:
        first = re.search(r"^from rlprompt", source, re.MULTILINE)
        assert first is not None
        line = f"from {dotted} import {part.class_name}\n"
        source = source[: first.start()] + line + source[first.start() :]
    registry.write_text(source, encoding="utf-8")
    assert len(source.splitlines()) - len(before) == 1 + bool(part.example)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of package and tests with one more of each kind, and a tiny model."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("rlprompt", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for kind, row in rows().items():
        add(root, PARTS[kind], row)
    save_tiny(root / "model")
    return root


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in the copy."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_every_row_that_names_a_dict_is_tried() -> None:
    assert rows().keys() == PARTS.keys()


@pytest.mark.slow
def test_a_recipe_can_name_what_was_added(copied: Path) -> None:
    changes = {
        "algorithm": {"type": "maxrl", "group_size": 2},
        "prompt": {"type": "low_rank", "init_text": "Be nice."},
        "engine": {"type": "timed"},
        "rewards": [{"path": "builtin:vowels"}],
        "tracking": {"trackers": ["csv"]},
    }
    (copied / "recipe.yaml").write_text(yaml.safe_dump(with_changes(changes)))
    done = run(copied, "-m", "rlprompt", "train", "recipe.yaml", "--output", "run")
    assert done.returncode == 0, done.stderr
    assert (copied / "run" / "metrics.csv").read_text().count("\n") == 4
    info = json.loads((copied / "run" / "artifact" / "prompt.json").read_text())
    assert info["representation"] == "low_rank"
    done = run(copied, "-m", "rlprompt", "chat", "run/artifact", "--query", "what is rain")
    assert done.returncode == 0, done.stderr
    done = run(copied, "-m", "rlprompt", "train", "recipe.yaml", "algorithm.strenght=1")
    assert "unknown key 'algorithm.strenght'; did you mean 'strength'?" in done.stderr


@pytest.mark.slow
def test_the_schema_shows_what_was_added(copied: Path) -> None:
    done = run(copied, "-m", "rlprompt", "schema")
    assert done.returncode == 0, done.stderr
    kinds = re.findall(r'"const": "(\w+)"', done.stdout)
    assert {"maxrl", "low_rank", "climb", "timed"} <= set(kinds)
    assert '"csv"' in done.stdout
    done = run(copied, "-m", "pytest", "-q", "tests/test_layers.py", "-k", "lower_floors or cycles")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_contract_tests_ask_for_a_case_and_then_run_on_it(copied: Path) -> None:
    missing = "every_algorithm_is_tested or representation_is_tested or every_searcher_is_tested"
    pytest_ = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contracts", "-k")
    done = run(copied, *pytest_, missing)
    assert "3 failed" in done.stdout, done.stdout
    for name in ("maxrl", "low_rank", "climb"):
        assert name in done.stdout
    for part in PARTS.values():
        if part.case:
            file = copied / "tests" / "fixtures" / part.case
            source = file.read_text(encoding="utf-8")
            begin = re.search(r"^(CASES|KINDS): .*= {\n", source, re.MULTILINE)
            assert begin is not None
            line = f"    {part.settings}\n"
            file.write_text(source[: begin.end()] + line + source[begin.end() :], encoding="utf-8")
    done = run(
        copied, *pytest_, f"maxrl or low_rank or climb or timed or csv or vowels or {missing}"
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 30
