"""What a parameter may be: one thing, not a bare tuple of several.

A tuple of a fixed length says by place what a name should say. Things that belong together are a
`NamedTuple` or a frozen dataclass; things that do not are parameters of their own. A sequence,
`tuple[str, ...]`, is one thing. Read from the annotations of every function, with names that stand
for a tuple looked up where they are defined.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("rlprompt", "benchmarks", "experiments")

ALLOWED = {
    "rlprompt/kernels/triton/attention.py _setup output": "torch.library hands over what the "
    "operator returned",
    "rlprompt/model/cpu/fused_modules.py forward position_embeddings": "transformers hands cosines "
    "and sines to its attention modules so",
}
"""`file function parameter` -> the interface of others that asks for it."""

Aliases = Mapping[str, Mapping[str, ast.expr]]
"""Module -> the names that it assigns types to."""


def modules() -> dict[str, ast.Module]:
    """Every module by its path from the root."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text(encoding="utf-8")) for p in paths}


def aliases(tree: ast.Module) -> dict[str, ast.expr]:
    """Names of a module that may stand for a type: `Pair = tuple[str, str]`."""
    return {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Subscript | ast.BinOp)
    }


def visible_aliases(tree: ast.Module, known: Aliases) -> dict[str, ast.expr]:
    """The module's own, and those that it imports from another module that is read here."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    found = {
        name.asname or name.name: theirs[name.name]
        for node in imports
        for theirs in [known.get(node.module or "", {})]
        for name in node.names
        if name.name in theirs
    }
    return found | aliases(tree)


def has_bare_tuple(annotation: ast.expr, names: Mapping[str, ast.expr]) -> bool:
    """Whether a tuple of a fixed or unknown length is anywhere in a type."""
    match annotation:
        case ast.Constant(value=str(text)):
            return has_bare_tuple(ast.parse(text, mode="eval").body, names)
        case ast.Name(id="tuple") | ast.Name(id="Tuple"):
            return True
        case ast.Name(id=name) if name in names:
            rest = {other: value for other, value in names.items() if other != name}
            return has_bare_tuple(names[name], rest)
        case ast.Subscript(value=ast.Name(id="tuple" | "Tuple"), slice=inside):
            match inside:
                case ast.Tuple(elts=[element, ast.Constant(value=value)]) if value is Ellipsis:
                    return has_bare_tuple(element, names)
            return True
        case ast.Subscript(value=ast.Name(id="Literal")):
            return False
        case ast.Subscript(value=ast.Name(id="Callable"), slice=ast.Tuple(elts=[given, _])):
            return has_bare_tuple(given, names)  # what is given back is no parameter
    return any(
        has_bare_tuple(child, names)
        for child in ast.iter_child_nodes(annotation)
        if isinstance(child, ast.expr)
    )


def parameters(tree: ast.Module) -> Iterator[tuple[str, ast.arg]]:
    """Each function's name with each of its annotated parameters."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            starred = [each for each in (given.vararg, given.kwarg) if each is not None]
            for each in [*given.posonlyargs, *given.args, *given.kwonlyargs, *starred]:
                yield node.name, each


def bare_tuples(trees: Mapping[str, ast.Module]) -> Iterator[str]:
    """`file function parameter` of every parameter that takes a bare tuple."""
    dotted = {path.removesuffix(".py").replace("/", "."): aliases(t) for path, t in trees.items()}
    for path, tree in trees.items():
        names = visible_aliases(tree, dotted)
        for function, parameter in parameters(tree):
            if parameter.annotation is not None and has_bare_tuple(parameter.annotation, names):
                yield f"{path} {function} {parameter.arg}"


def test_no_parameter_is_a_tuple_of_several_things() -> None:
    found = set(bare_tuples(modules())) - ALLOWED.keys()
    assert sorted(found) == []


def test_what_is_allowed_is_there() -> None:
    found = set(bare_tuples(modules()))
    assert found >= ALLOWED.keys()


@pytest.mark.parametrize(
    "annotation",
    [
        "tuple",
        "tuple[int, str]",
        "tuple[int, int]",
        "tuple[Path, Sequence[str], Options] | None",
        "Sequence[tuple[str, float]]",
        "Mapping[str, tuple[Color, Series]]",
        "tuple[tuple[int, int], ...]",
        "Callable[[tuple[int, str]], None]",
        "'tuple[int, str]'",
        "Pair",
        "list[Imported]",
    ],
)
def test_a_tuple_of_several_things_is_found(annotation: str) -> None:
    assert list(bare_tuples(_trees(annotation))) == ["a.py f x"]


@pytest.mark.parametrize(
    "annotation",
    [
        "tuple[str, ...]",
        "Sequence[tuple[Message, ...]]",
        "Callable[[int], tuple[int, str]]",
        "Literal['tuple']",
        "Named",
    ],
)
def test_one_thing_passes(annotation: str) -> None:
    assert list(bare_tuples(_trees(annotation))) == []


def test_starred_parameters_and_methods_count_and_results_do_not() -> None:
    source = (
        "class A:\n"
        "    def f(self, *tiles: tuple[int, str]) -> tuple[int, str]: ...\n"
        "    async def g(self, *, one: tuple[int, str], **more: tuple[int, str]): ...\n"
    )
    found = list(bare_tuples({"a.py": ast.parse(source)}))
    assert found == ["a.py f tiles", "a.py g one", "a.py g more"]


def _trees(annotation: str) -> dict[str, ast.Module]:
    """A function with one parameter; `Pair` and `Imported` are tuples, `Named` is a class."""
    source = (
        "from b import Imported\nPair = tuple[int, str]\nclass Named(NamedTuple):\n    a: int\n"
        f"def f(x: {annotation}): ...\n"
    )
    return {"a.py": ast.parse(source), "b.py": ast.parse("Imported = tuple[int, int] | None")}
