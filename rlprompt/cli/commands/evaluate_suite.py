"""`rlprompt eval --suite`: a suite on one artifact or several, with a gate for CI."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprompt import __version__
from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.errors import InputError
from rlprompt.files import to_json, write_atomic, writing_to
from rlprompt.reports.suite import write_suite_page
from rlprompt.serving.loaded import artifact_folder
from rlprompt.standard_streams import outlive_output
from rlprompt.suites.cells import Cells, code_version, digest
from rlprompt.suites.evaluate import SuiteRun, num_cells
from rlprompt.suites.findings import findings
from rlprompt.suites.gate import GateSettings, check, load_gate
from rlprompt.suites.ground import Asked, Bases, Subject, prepare
from rlprompt.suites.schema import SuiteSettings, load_suite, suite_path
from rlprompt.tracking.console import PlainConsole, visible

FAILED = 1
"""Exit code where a gate is not passed."""
_DEFAULT = "default"


@dataclass(frozen=True)
class SuiteOptions:
    """What the command was called with."""

    suite: str | None
    """Name or path; None = the default one, for a gate."""
    gate: Path | None
    output: Path | None
    recipe: Path | None
    overrides: Sequence[str]
    force: bool
    verbose: bool


def run_suite(artifacts: Sequence[Path], options: SuiteOptions) -> int:
    """Evaluate artifacts with a suite; writes evaluation.json and suite.html.

    Args:
        artifacts: folders of artifacts or runs; none = the recipe's prompt before training.
        options: what the command was called with.

    Returns:
        0, or 1 where an artifact does not pass the gate.

    Raises:
        InputError: suite, gate, recipe or artifact is wrong, or the folder cannot be written.
    """
    output = options.output
    if output is None:
        raise InputError(
            "a suite writes a page, numbers and what it goes on from; name a folder with --output"
        )
    outlive_output()
    notes = PlainConsole(stderr=True)
    setup_logging(notes, logging.WARNING, options.verbose)
    name = options.suite or _DEFAULT
    suite = load_suite(name)
    gate = None if options.gate is None else load_gate(options.gate)
    with writing_to(output):
        pass  # before anything takes minutes
    cells, bases = Cells(output / "cells"), Bases()
    found: dict[str, Any] = {}
    folders: list[Path | None] = [artifact_folder(each) for each in artifacts]
    for folder in folders or [None]:
        asked = Asked(folder, options.recipe, options.overrides, options.force)
        with notes.status("loading data, rewards and model"):
            subject = prepare(asked, suite, suite_path(name).parent, bases)
        label = _unique(subject.name, found)
        result = _evaluated(subject, suite, cells, notes, label)
        found[label] = {"artifact": None if folder is None else str(folder), **result}
    report = {
        "suite": suite.name,
        "suite_hash": digest(suite.model_dump(mode="json")),
        "rlprompt": __version__,
        "code": code_version(),
        "seed": suite.seed,
        "cells_computed": cells.num_made,
        "cells_kept": cells.num_kept,
        "artifacts": found,
        "gate": None,
    }
    try:
        report["gate"] = _gated(gate, options.gate, found)
    finally:  # a gate that names what was not measured shall not cost the numbers
        _write(report, output)
    _tell(report, output)
    verdict = report["gate"]
    return FAILED if isinstance(verdict, dict) and not verdict["passes"] else 0


def _write(report: Mapping[str, Any], output: Path) -> None:
    with writing_to(output):
        write_atomic(output / "evaluation.json", to_json(report, indent=1) + "\n")
        write_suite_page(report, output / "suite.html")


def _evaluated(
    subject: Subject, suite: SuiteSettings, cells: Cells, notes: PlainConsole, label: str
) -> dict[str, Any]:
    """What the suite says of one prompt, with what it is and that the base is as it was."""
    ground = subject.ground
    before, total = cells.num_made + cells.num_kept, num_cells(suite, ground)

    def say(line: str) -> None:
        place = cells.num_made + cells.num_kept - before + 1
        notes.print(f"{visible(label)}: {place}/{total} {line}", markup=False, highlight=False)

    try:
        result = SuiteRun(suite, ground, cells, say).evaluate(subject.prompt)
    finally:
        ground.rewards.close()
    ground.policy.verify()
    return {
        "recipe": subject.recipe,
        "representation": subject.prompt.kind,
        "init_text": subject.prompt.init_text,
        "base": ground.policy.id,
        "base_fingerprint": ground.policy.fingerprint,
        "num_queries": len(ground.queries),
        "sampling": ground.sampling.model_dump(mode="json"),
        "findings": findings(result),
        **result,
    }


def _gated(
    gate: GateSettings | None, path: Path | None, found: Mapping[str, Any]
) -> dict[str, Any] | None:
    if gate is None:
        return None
    checks = {
        name: [each.plain() for each in check(gate, result["metrics"])]
        for name, result in found.items()
    }
    passes = {name: all(each["passes"] for each in own) for name, own in checks.items()}
    return {
        "file": str(path),
        "limits": gate.model_dump(mode="json")["limits"],
        "passes": all(passes.values()),
        "artifacts": {name: {"passes": passes[name], "checks": checks[name]} for name in checks},
    }


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    """The name, with a number where another artifact has it."""
    label, number = name, 2
    while label in taken:
        label, number = f"{name} ({number})", number + 1
    return label


def _tell(report: Mapping[str, Any], output: Path) -> None:
    """The result in a few lines on stdout."""
    lines: list[str] = []
    for name, result in report["artifacts"].items():
        lines.append(f"{visible(name)}: {result['num_queries']} queries, suite {report['suite']}")
        for reward, row in result["adherence"]["rewards"].items():
            gain = row["minus_base"]
            lines.append(
                f"  {reward}: {_number(row['prompt']['value'])}, minus base "
                f"{_number(gain['value'])} ({_number(gain['low'])} to {_number(gain['high'])})"
            )
        lines += [f"  {visible(sentence)}" for sentence in result["findings"]]
        lines += [f"  left out: {visible(sentence)}" for sentence in result["left_out"]]
    gate = report["gate"]
    if gate is not None:
        for name, own in gate["artifacts"].items():
            lines.append(f"gate {'passed' if own['passes'] else 'FAILED'}: {visible(name)}")
            lines += [
                f"  {'ok' if each['passes'] else 'no'}: {visible(each['sentence'])}"
                for each in own["checks"]
            ]
    lines.append(f"wrote {output / 'evaluation.json'} and {output / 'suite.html'}")
    sys.stdout.write("\n".join(lines) + "\n")


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"
