"""Who may import whom (docs/design/README.md), read from the imports of every module.

The package is a house: rooms on floors, and imports go down the stairs or stay inside a room.
Imports under `TYPE_CHECKING` do not run and do not count.
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

FLOORS: tuple[tuple[str, ...], ...] = (
    ("ground",),
    ("certify", "kernels", "data", "endpoints", "tracking"),
    ("model",),
    ("prompts",),
    ("policy",),
    ("algorithms", "artifacts", "engines", "rewards"),
    ("distributed", "registry", "rollout"),
    ("evaluation", "exports", "serving"),
    ("runs",),
    ("training", "reports"),
    ("search",),
    ("interpret", "recipe"),
    ("api", "extend", "planning", "reward_training", "slurm", "suites"),
    ("cli",),
    ("__main__",),
)
"""Rooms by floor: a folder of the package, or a module beside the folders. A module imports from
its own room and from rooms on lower floors, nothing else."""
GROUND = (
    "cpu_share",
    "errors",
    "files",
    "process_exit",
    "random_state",
    "reading",
    "settings",
    "standard_streams",
    "types",
    "user_code",
)
"""What everybody stands on, in one room: modules beside the folders, and the readers."""

# Packages that are heavy or optional, and the only modules or folders that may import them.
OWNERS = {
    "deepspeed": ("model.sharded.load",),
    "wandb": ("tracking.wandb_tracker",),
    "tensorboard": ("tracking.trackers",),
    "triton": ("kernels",),
    "datasets": ("data",),
    "matplotlib": ("reports.report", "reports.plots", "reward_training.plot"),
    "peft": ("prompts.adapter",),
    "trl": ("rewards", "reward_training.learning"),
    "httpx": ("rewards.models.http_client", "endpoints", "serving.vllm.client"),
    "uvicorn": ("serving.http_server",),
    "h11": ("serving.http_server",),
    "starlette": ("serving",),
    "cma": ("search.cmaes",),
    "cryptography": ("artifacts.signature",),
    "gepa": ("search.gepa_loop", "search.gepa_reflection"),
    "llguidance": ("engines.grammar", "engines.grammar_check"),
    "inspect_ai": ("suites.inspect_model",),
    "lm_eval": ("suites.lm_eval_model",),
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


def inside(module: str, entry: str) -> bool:
    """Whether a module is the entry, or in the folder that the entry names."""
    return f"{module}.".startswith(f"{entry}.")


def room_of(module: str) -> str:
    """The folder that a module is in, or the module itself where it lies beside the folders."""
    top = module.split(".")[0]
    return "ground" if top in GROUND else top


def floor_of(module: str) -> int | None:
    return next((n for n, rooms in enumerate(FLOORS, 1) if room_of(module) in rooms), None)


def our_imports(imports: ImportMap, module: str, module_level: bool = False) -> Iterator[str]:
    """The package's own modules that a module imports."""
    for dotted, at_module_level in sorted(imports[module]):
        if not is_ours(dotted) or (module_level and not at_module_level):
            continue
        target = local(dotted)
        if target in imports and target not in ("", module):
            yield target


def floor_errors(imports: ImportMap) -> list[str]:
    errors = []
    for module in imports:
        floor = floor_of(module)
        if floor is None:
            if module:
                errors.append(f"{module} has no floor: add its room to FLOORS and the design page")
            continue
        for target in our_imports(imports, module):
            target_floor = floor_of(target)
            if room_of(module) != room_of(target) and (target_floor or 0) >= floor:
                errors.append(f"{module} (floor {floor}) imports {target} (floor {target_floor})")
    return errors


def owned_package(dotted: str) -> str | None:
    """The heavy package that an import brings in."""
    top = "tensorboard" if dotted.startswith("torch.utils.tensorboard") else dotted.split(".")[0]
    return top if top in OWNERS else None


def owner_errors(imports: ImportMap) -> list[str]:
    errors = []
    for module, found in imports.items():
        for package in sorted({p for name, _ in found if (p := owned_package(name))}):
            if not any(inside(module, entry) for entry in OWNERS[package]):
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


def test_modules_import_only_from_lower_floors_or_their_own_room() -> None:
    assert floor_errors(read_imports(ROOT)) == []


def test_every_room_exists() -> None:
    imports = read_imports(ROOT)
    assert {room for floor in FLOORS for room in floor} == {room_of(m) for m in imports if m}
    owners = {module for modules in OWNERS.values() for module in modules}
    assert {*GROUND, *owners} <= imports.keys()


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
    assert floor_errors(imports) == ["policy (floor 5) imports rollout (floor 7)"]


def test_a_sideways_import_is_found_and_one_inside_the_package_is_not(tmp_path: Path) -> None:
    imports = write_package(
        tmp_path,
        engines__native="from .base import x\nfrom rlprompt.rewards import length",
        engines__base="",
        rewards__length="from rlprompt.errors import InputError",
        errors="",
    )
    assert floor_errors(imports) == ["engines.native (floor 6) imports rewards.length (floor 6)"]


def test_a_module_without_a_floor_is_named(tmp_path: Path) -> None:
    (error,) = floor_errors(write_package(tmp_path, helpers=""))
    assert error.startswith("helpers has no floor")


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
    assert floor_errors(write_package(tmp_path, policy=source, cli="")) == []


def test_a_heavy_import_outside_its_owner_is_found(tmp_path: Path) -> None:
    imports = write_package(
        tmp_path,
        rollout="import importlib\n\ndef f():\n    importlib.import_module('wandb')",
        tracking__wandb_tracker="import wandb\n",
        tracking__trackers="from torch.utils.tensorboard import SummaryWriter",
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
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'trl', 'peft', 'wandb',"
        " 'starlette', 'uvicorn'}\n"
        "print('HEAVY:', sorted(heavy & set(sys.modules)))\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == "HEAVY: []"
    assert "Usage" in shown.stdout
