"""How much of the house a reader meets: a plain GRPO step, the floors, the public names.

python benchmarks/structure.py [--json FILE]

step_files, step_lines, step_functions   what one step of a run runs through in rlprompt/ (soft
                                         prompt, tiny Llama in float32, two queries x four)
step_page_lines                          training/step.py, which is that step from top to bottom
loop_page_lines                          examples/grpo_loop.py, the same over the public pieces
floors, rooms                            of the package (tests/test_layers.py)
upward_imports                           imports that go up or sideways; nothing excuses one
modules, lines                           of the package
public_names                             in `rlprompt.__all__`
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("pytest") is None:
    sys.exit("error: pytest is not installed; run `pip install 'rlprompt[dev]'`")

import rlprompt  # noqa: E402
from tests import test_layers  # noqa: E402
from tests.fixtures.runs import gradient_step, tiny_trainer  # noqa: E402

PACKAGE = ROOT / "rlprompt"


def traced(work: Callable[[], object]) -> set[CodeType]:
    """The code objects of rlprompt/ that are entered while something runs."""
    seen: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            seen.add(frame.f_code)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


def step_figures() -> dict[str, int]:
    """What one step runs through, after one that has made what is made once."""
    with tempfile.TemporaryDirectory() as folder:
        run = tiny_trainer(
            Path(folder),
            Path(folder) / "run",
            training={"queries_per_step": 2},
            rewards=[{"path": "rewards.py:letters"}],
        )
        learner = gradient_step(run)
        learner.step(0, seed=1)
        codes = traced(lambda: learner.step(1, seed=2))
        learner.close()
    files = {Path(code.co_filename) for code in codes}
    named = {code for code in codes if not code.co_name.startswith("<")}
    return {
        "step_files": len(files),
        "step_lines": sum(count_lines(path) for path in files),
        "step_functions": len(named),
    }


def count_lines(path: Path) -> int:
    """Lines of a file, empty ones and comments included."""
    return len(path.read_text(encoding="utf-8").splitlines())


def house_figures() -> dict[str, int]:
    """Floors, imports and sizes of the package."""
    modules = sorted(PACKAGE.rglob("*.py"))
    return {
        "step_page_lines": count_lines(PACKAGE / "training" / "step.py"),
        "loop_page_lines": count_lines(ROOT / "examples" / "grpo_loop.py"),
        "floors": len(test_layers.FLOORS),
        "rooms": sum(len(rooms) for rooms in test_layers.FLOORS),
        "upward_imports": len(test_layers.floor_errors(test_layers.read_imports(ROOT))),
        "modules": len(modules),
        "lines": sum(count_lines(path) for path in modules),
        "public_names": len(rlprompt.__all__),
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    figures = step_figures() | house_figures()
    for name, value in figures.items():
        print(f"{name:20}{value:8}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
