"""`rlprompt compare` on logs of Inspect: paired differences, in words or as JSON."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rlprompt.certify.verdict import phrase
from rlprompt.errors import InputError
from rlprompt.evaluation.inspect_logs import (
    ScorerComparison,
    compare_inspect_logs,
    read_inspect_log,
)
from rlprompt.files import to_json
from rlprompt.tracking.console import visible


def are_logs(paths: Sequence[Path]) -> bool:
    """Whether logs are named, and not folders of runs.

    Args:
        paths: what the command was called with.
    """
    return any(path.suffix == ".json" and not path.is_dir() for path in paths)


def run(paths: Sequence[Path], as_json: bool) -> None:
    """Compare logs and print what may be said.

    Args:
        paths: JSON logs of one task, two or more.
        as_json: whether JSON is printed.

    Raises:
        InputError: there are fewer, one is named twice, or they cannot be compared.
    """
    if len(paths) < 2:
        raise InputError("one log cannot be compared; name two or more of one task")
    real = [path.resolve() for path in paths]
    for place, path in enumerate(real):
        if path in real[:place]:
            raise InputError(f"'{paths[place]}' is named twice; name different logs")
        if path.suffix != ".json":
            raise InputError(
                f"'{paths[place]}' is no JSON log and others are; name logs alone, or runs alone"
            )
    logs = [read_inspect_log(path) for path in paths]
    found = compare_inspect_logs(logs)
    if as_json:
        plain = {
            "task": logs[0].task,
            "logs": [{"path": str(log.path), "model": log.model} for log in logs],
            "scorers": [asdict(each) for each in found],
        }
        sys.stdout.write(to_json(plain, indent=2) + "\n")
        return
    names = [f"{path.name} ({log.model})" for path, log in zip(paths, logs, strict=True)]
    for each in found:
        sys.stdout.write("\n".join(_lines(each, [visible(name) for name in names])) + "\n")


def _lines(found: ScorerComparison, names: Sequence[str]) -> list[str]:
    lines = [f"{visible(found.scorer)}, {found.means[0].num_queries} samples"]
    for name, mean in zip(names, found.means, strict=True):
        ends = f" ({mean.low:.3f} to {mean.high:.3f})" if math.isfinite(mean.low) else ""
        lines.append(f"  {name}: {mean.value:.3f}{ends}")
    for name, difference in zip(names[1:], found.against_first, strict=True):
        lines.append(f"  {name}: {phrase(difference, names[0])}")
    return lines
