"""Print the lines of every Python file and the longest functions, so that growth is seen.

python scripts/size.py [FOLDER ...]        default: rlprompt
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_FILE_LINES = 600  # a file is as long as its idea: a lower limit made satellites
MAX_FUNCTION_LINES = 80
NUM_LONGEST = 10


@dataclass(frozen=True, order=True)
class Function:
    """A function or method: its length with signature and docstring, without decorators."""

    num_lines: int
    name: str
    path: Path
    first_line: int

    def __str__(self) -> str:
        return f"{self.num_lines:6d}  {self.path}:{self.first_line} {self.name}"


def python_files(folder: Path) -> list[Path]:
    """Every Python file below the folder, sorted by path."""
    return sorted(folder.rglob("*.py"))


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(path: Path) -> Iterator[Function]:
    """Every function of a file, nested ones and methods included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Function(num_lines, node.name, path, node.lineno)


def report(folder: Path) -> None:
    files = python_files(folder)
    if not files:
        raise SystemExit(f"{folder} holds no Python file.")
    lengths = {path: count_lines(path) for path in files}
    for path, length in lengths.items():
        print(f"{length:6d}  {path}{'  <-- too long' if length > MAX_FILE_LINES else ''}")
    longest = sorted((f for path in files for f in functions(path)), reverse=True)
    print(f"\nlongest functions of {len(longest)}:")
    for function in longest[:NUM_LONGEST]:
        too_long = function.num_lines > MAX_FUNCTION_LINES
        print(f"{function}{'  <-- too long' if too_long else ''}")
    median = statistics.median(lengths.values())
    print(f"\n{folder}: {len(files)} files, {sum(lengths.values())} lines, median {median:g}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("rlprompt")])
    for folder in parser.parse_args().folders:
        report(folder)


if __name__ == "__main__":
    main()
