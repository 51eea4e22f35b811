"""Who may import whom (docs/design/README.md), read from the imports of every module.

A module imports from lower layers, from its own package, or from the vocabulary that everything
shares. Imports under `TYPE_CHECKING` do not run and do not count.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "rlprompt"

# A name that ends with a dot stands for everything in that package, its __init__ included; the
# longest entry that fits decides. Any other name stands for that one module.
LAYERS = {
    "": 0,
    "types": 0,
    "errors": 0,
    "leaving": 0,
    "settings": 0,
    "kernels.": 0,
    "certify.bounds": 0,
    "prompts.": 1,
    "rewards.": 1,
    "rewards.preference.": 3,  # its judge may be the policy's base
    "rewards.preference.training.": 4,  # draws completions with an engine
    "model.": 1,
    "model.adapted": 0,  # knows modules and tensors only; adapters among the prompts use it
    "data": 1,
    "data.": 1,
    "training.": 1,  # the lowest of the package: a new module may import little until it says more
    "algorithms.advantages": 1,
    "algorithms.constraints": 1,
    "algorithms.gae": 1,
    "algorithms.kl": 1,
    "algorithms.losses": 1,
    "algorithms.preference": 1,
    "algorithms.robust": 1,
    "algorithms.shaping": 1,
    "algorithms.value_head": 1,
    "policy": 2,
    "training.checkpoint": 2,
    "training.startup": 3,
    "training.state": 3,
    "training.summary": 3,
    "artifacts.": 3,
    "engines.": 3,
    "algorithms.": 3,
    "search.": 3,
    "rollout": 4,
    "training.objective": 4,
    "training.accounts": 5,
    "training.rows": 5,
    "training.update": 5,
    "training.sources": 5,
    "training.overlap": 5,
    "search.loop": 5,
    "evaluation.": 5,
    "interpret.": 5,
    "certify.": 5,
    "training.parts": 6,
    "training.loop": 6,
    "training.population": 6,
    "recipe": 7,
    "recipe_build": 8,
    "recipe_file": 1,
    "serving.": 9,
    "slurm.": 9,
    "planning": 9,
    "planning_tables": 0,
    "chat": 9,
    "commands.": 10,
    "cli_reward": 11,
    "cli": 12,
    "__main__": 13,
}
VOCABULARY = ("types", "errors", "settings")

# Packages that are heavy or optional, and the only modules that may import them (at any depth).
OWNERS = {
    "deepspeed": ("model.sharding_load",),
    "wandb": ("training.tracking_wandb",),
    "tensorboard": ("training.tracking", "training.tracking."),
    "vllm": ("engines.vllm",),
    "triton": ("kernels.",),
    "cma": ("search.cmaes",),
    "datasets": ("data", "data."),
    "matplotlib": ("training.report", "training.plots", "rewards.preference.training.plot"),
    "peft": ("prompts.adapter", "artifacts.export"),
    "trl": ("rewards.",),
    "httpx": ("rewards.remote.client",),
}

ImportMap = dict[str, set[tuple[str, bool]]]
"""Module -> `(dotted name it imports, whether that happens at module level)`."""


class Imports(ast.NodeVisitor):
    """Collect what a module imports, by statement or by `import_module("...")`."""

    def __init__(self, module: str, is_package: bool) -> None:
        self.package = module if is_package else module.rpartition(".")[0]
        self.found: set[tuple[str, bool]] = set()
        self.at_module_level = True

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {(alias.name, self.at_module_level) for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parent = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
            base = ".".join([*parent, base] if base else parent)
        # `from a import b` may name a module a.b; whether it does is settled by who exists.
        for alias in node.names:
            self.found.add((f"{base}.{alias.name}", self.at_module_level))
        self.found.add((base, self.at_module_level))

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self.found.add((name.value, self.at_module_level))
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)
            return
        for statement in node.orelse:
            self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer, self.at_module_level = self.at_module_level, False
        self.generic_visit(node)
        self.at_module_level = outer

    visit_AsyncFunctionDef = visit_FunctionDef


def read_imports(root: Path) -> ImportMap:
    """The imports of every module; names leave out the package, whose __init__ is ''."""
    imports: ImportMap = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        visitor = Imports(module, is_package)
        visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
        imports[local(module)] = visitor.found
    return imports


def local(dotted: str) -> str:
    return dotted.removeprefix(PACKAGE).removeprefix(".")


def is_ours(dotted: str) -> bool:
    return dotted == PACKAGE or dotted.startswith(f"{PACKAGE}.")


def matches(module: str, entry: str) -> bool:
    if entry.endswith("."):
        return f"{module}.".startswith(entry)
    return module == entry


def layer_of(module: str) -> int | None:
    entry = max((e for e in LAYERS if matches(module, e)), key=len, default=None)
    return None if entry is None else LAYERS[entry]


def our_imports(imports: ImportMap, module: str, module_level: bool = False) -> Iterator[str]:
    """The package's own modules that a module imports."""
    for dotted, at_module_level in sorted(imports[module]):
        if not is_ours(dotted) or (module_level and not at_module_level):
            continue
        target = local(dotted)
        if target in imports and target not in ("", module):
            yield target


def layer_errors(imports: ImportMap) -> list[str]:
    errors = []
    for module in imports:
        layer = layer_of(module)
        if layer is None:
            errors.append(f"{module} has no layer: add it to LAYERS and to the design page")
            continue
        for target in our_imports(imports, module):
            target_layer = layer_of(target)
            if target_layer is None or target in VOCABULARY:
                continue
            same_package = module.split(".")[0] == target.split(".")[0]
            if target_layer > layer or (target_layer == layer and not same_package):
                errors.append(f"{module} (L{layer}) imports {target} (L{target_layer})")
    return errors


def owned_package(dotted: str) -> str | None:
    """The heavy package that an import brings in."""
    top = "tensorboard" if dotted.startswith("torch.utils.tensorboard") else dotted.split(".")[0]
    return top if top in OWNERS else None


def owner_errors(imports: ImportMap) -> list[str]:
    errors = []
    for module, found in imports.items():
        for package in sorted({p for name, _ in found if (p := owned_package(name))}):
            if not any(matches(module, entry) for entry in OWNERS[package]):
                errors.append(f"{module} imports {package}, which belongs to {OWNERS[package]}")
    return errors


def cycle(imports: ImportMap) -> list[str]:
    """The modules of one cycle among imports that run at import time, or an empty list.

    Importing `a.b` runs the __init__ of `a` first, so that counts as an import of `a` too, unless
    the importer is inside `a` and so already runs under it.
    """
    graph: dict[str, set[str]] = {}
    for module in imports:
        edges = set(our_imports(imports, module, module_level=True))
        for target in list(edges):
            parent = target.rpartition(".")[0]
            if parent and not f"{module}.".startswith(f"{parent}."):
                edges.add(parent)
        graph[module] = edges
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_modules_import_only_from_lower_layers_or_their_own_package() -> None:
    assert layer_errors(read_imports(ROOT)) == []


def test_no_import_cycles() -> None:
    assert cycle(read_imports(ROOT)) == []


def test_heavy_packages_are_imported_by_their_owner_only() -> None:
    assert owner_errors(read_imports(ROOT)) == []


def write_package(root: Path, **sources: str) -> ImportMap:
    """A package of modules made for a test; `__` in a name stands for a folder."""
    for name, source in {"__init__": "", **sources}.items():
        path = root / PACKAGE / (name if name == "__init__" else name.replace("__", "/", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(source, encoding="utf-8")
    return read_imports(root)


def test_an_upward_import_is_found_even_inside_a_function(tmp_path: Path) -> None:
    imports = write_package(
        tmp_path,
        rollout="",
        policy="def f():\n    from rlprompt import rollout",
        cli="import rlprompt.rollout.collect",
    )
    assert layer_errors(imports) == ["policy (L2) imports rollout (L4)"]


def test_a_sideways_import_is_found_and_one_inside_the_package_is_not(tmp_path: Path) -> None:
    imports = write_package(
        tmp_path,
        prompts__soft="from .base import x\nfrom rlprompt.errors import InputError",
        prompts__base="",
        rewards__length="from rlprompt.prompts import soft",
        errors="",
    )
    assert layer_errors(imports) == ["rewards.length (L1) imports prompts.soft (L1)"]


def test_a_module_without_a_layer_is_named(tmp_path: Path) -> None:
    (error,) = layer_errors(write_package(tmp_path, helpers=""))
    assert error.startswith("helpers has no layer")


def test_a_cycle_through_a_package_init_is_found(tmp_path: Path) -> None:
    sources = {
        "policy": "from rlprompt.algorithms.losses import f",
        "algorithms__losses": "",
        "algorithms__grpo": "import rlprompt.policy",
    }
    assert cycle(write_package(tmp_path / "empty", algorithms____init__="", **sources)) == []
    registry = "from rlprompt.algorithms import grpo"
    found = cycle(write_package(tmp_path / "full", algorithms____init__=registry, **sources))
    assert set(found) == {"policy", "algorithms", "algorithms.grpo"}


def test_type_checking_imports_do_not_count(tmp_path: Path) -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rlprompt import cli"
    assert layer_errors(write_package(tmp_path, policy=source, cli="")) == []


def test_a_heavy_import_outside_its_owner_is_found(tmp_path: Path) -> None:
    imports = write_package(
        tmp_path,
        rollout="import importlib\n\ndef f():\n    importlib.import_module('wandb')",
        training__tracking_wandb="import wandb\n",
        training__tracking="from torch.utils.tensorboard import SummaryWriter",
    )
    (error,) = owner_errors(imports)
    assert error.startswith("rollout imports wandb")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from rlprompt.cli.main import main\n"
        f"sys.argv = ['rlprompt', *{arguments!r}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'trl', 'peft', 'wandb'}\n"
        "print('HEAVY:', sorted(heavy & set(sys.modules)))\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == "HEAVY: []"
    assert "Usage" in shown.stdout
