"""Everything that the first minutes on a GPU should show: one command, a time limit per part.

    python benchmarks/gpu_check.py --output DIR [--model DIR] [--dry-run] [--only PART ...]

Each part of PARTS is a process of its own that is ended at its limit; one that fails or hangs does
not stop the others. DIR gets gpu_check.json (rewritten after each part, so that a lease which ends
early leaves what was done), summary.md, log.txt and pictures: at most eight files. The exit status
is 1 when a part failed. `--dry-run` runs all of it on the CPU, with Triton's interpreter and tiny
shapes, with ten times the limits: it checks this script, and measures nothing.

This file imports neither torch nor rlprompt, so that it reports whatever is wrong with them.
`scripts/gpu_check.sh` sets the path up, with a folder of wheels where packages are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BUDGET = 540
"""Seconds that all parts may take together, less what set-up takes."""
GRACE = 3.0
"""Seconds between asking a part to end and ending it."""
DRY_SLACK = 10
"""How many times its limit a part may take in a dry run, which shares a CPU with who knows what."""
KEPT_LOG = 200_000
"""Characters of a part's output that log.txt keeps, from its end."""


class Part(NamedTuple):
    """One part of the check."""

    name: str
    target: str
    """`module:function` of a function of a `World`."""
    limit: int
    """Seconds after which it is ended."""
    shows: str


PARTS = (
    Part("machine", "benchmarks.gpu.speed:machine", 25, "versions, the GPU's own peaks"),
    Part("kernel_tests", "benchmarks.gpu.suites:kernel_tests", 90, "every kernel test"),
    Part("cuda_tests", "benchmarks.gpu.suites:cuda_tests", 80, "engines, policy, training"),
    Part("agreement", "benchmarks.gpu.correct:agreement", 45, "GPU against CPU, greedy tokens"),
    Part("training", "benchmarks.gpu.correct:training", 45, "GRPO, a checkpoint resumed"),
    Part("kernels", "benchmarks.gpu.suites:kernel_speed", 60, "kernels against their peers"),
    Part("step_1b", "benchmarks.gpu.speed:step_1b", 50, "a step of 1B against TRL + PEFT"),
    Part("step_8b", "benchmarks.gpu.speed:step_8b", 70, "a step of 8B against TRL + PEFT"),
    Part(
        "decode_graphs", "benchmarks.gpu.graphs:decode_graphs", 38, "recorded steps against plain"
    ),
    Part("decode_profile", "benchmarks.gpu.speed:decode_profile", 25, "where decoding goes"),
)


def run_part(part: Part, options: argparse.Namespace, log: Path) -> dict[str, Any]:
    """One part in a process of its own; its output goes to the end of `log`.

    Returns:
        `name`, `status` (passed, failed or timeout), `seconds`, `limit`, `reason` and `figures`.
    """
    limit = part.limit * (DRY_SLACK if options.dry_run else 1)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as scratch:
        result = Path(scratch) / "result.json"
        command = [sys.executable, __file__, "--part", part.target, "--result", str(result)]
        command += ["--scratch", scratch, "--output", str(options.output)]
        command += ["--dry-run"] if options.dry_run else []
        command += ["--model", str(options.model)] if options.model else []
        start = time.monotonic()
        with (Path(scratch) / "log").open("wb") as shown:
            status = _wait(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=child_environment(options.dry_run),
                    stdin=subprocess.DEVNULL,
                    stdout=shown,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                ),
                limit,
            )
        seconds = time.monotonic() - start
        said = (Path(scratch) / "log").read_text(encoding="utf-8", errors="replace")
        with log.open("a", encoding="utf-8") as stream:
            stream.write(f"\n===== {part.name} ({seconds:.1f} s)\n{said[-KEPT_LOG:]}\n")
        record = {"name": part.name, "seconds": round(seconds, 2), "limit": limit}
        return {**record, **judged(status, result, limit, said)}


def judged(status: int | None, result: Path, limit: int, said: str) -> dict[str, Any]:
    """What a process that ended with `status` came to; None = it was ended at its limit."""
    if status is None:
        reason = f"ended at its limit of {limit} s"
        return {"status": "timeout", "reason": reason, "figures": {}}
    try:
        written = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        reason = f"ended with {status} and left no result: {last[:300]}"
        return {"status": "failed", "reason": reason, "figures": {}}
    return dict(written)


def _wait(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """The exit status, or None where the process and its children were ended at the limit."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            _end(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        # Children that outlived it hold the device's memory; the group is this part's own.
        _end(process, signal.SIGKILL)
        process.wait()
    return None


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def child_environment(dry_run: bool) -> dict[str, str]:
    """The environment of a part: no network, the checkout on the path, the interpreter if dry."""
    given = os.environ
    path = os.pathsep.join([str(ROOT), *filter(None, [given.get("PYTHONPATH")])])
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
    made = {**given, **offline, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
    if dry_run:
        made |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return made


def run_here(options: argparse.Namespace) -> int:
    """Inside a part's process: call the function and write its result."""
    record: dict[str, Any]
    try:
        from benchmarks.gpu.world import PartFailedError, World

        module, _, name = options.part.partition(":")
        world = World(options.dry_run, options.model, options.output, options.scratch)
        try:
            figures = getattr(importlib.import_module(module), name)(world)
            record = {"status": "passed", "reason": "", "figures": figures}
        except PartFailedError as error:
            record = {"status": "failed", "reason": str(error), "figures": error.figures}
    except BaseException as error:  # also SystemExit: whatever it was is this part's result
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"[:500]
        record = {"status": "failed", "reason": reason, "figures": {}}
    options.result.write_text(json.dumps(record, default=str) + "\n", encoding="utf-8")
    return 0 if record["status"] == "passed" else 1


def summary(record: dict[str, Any]) -> str:
    """The table of a check, as Markdown."""
    title = "# GPU check"
    if record["dry_run"]:
        title += "\n\n**A dry run on the CPU: no figure here says anything about a GPU.**"
    lines = [title, "", "| part | result | seconds | limit | figures |", "|---|---|---|---|---|"]
    for part in record["parts"]:
        shown = part["reason"] or headline(part["figures"])
        shown = " ".join(shown.split()).replace("|", "\\|")
        lines.append(
            f"| {part['name']} | {part['status']} | {part['seconds']:.1f} | {part['limit']} "
            f"| {shown} |"
        )
    return "\n".join([*lines, ""])


def headline(figures: dict[str, Any], prefix: str = "") -> str:
    """The plain numbers and names of some figures, two levels deep, in one line."""
    found = []
    for key, value in figures.items():
        if isinstance(value, bool | int | str):
            found.append(f"{prefix}{key} {value}")
        elif isinstance(value, float):
            found.append(f"{prefix}{key} {value:.4g}")
        elif isinstance(value, dict) and not prefix:
            found.append(headline(value, f"{key}."))
    return ", ".join(filter(None, found))


def write(record: dict[str, Any], output: Path) -> None:
    """gpu_check.json and summary.md, as far as the check has come."""
    target = output / "gpu_check.json"
    partial = target.with_suffix(".tmp")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(target)
    (output / "summary.md").write_text(summary(record), encoding="utf-8")


def check(options: argparse.Namespace, parts: Iterable[Part]) -> int:
    """Run parts one after the other and report; 1 when one did not pass."""
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "log.txt"
    log.write_text(f"{platform.platform()}, Python {platform.python_version()}\n")
    record: dict[str, Any] = {"dry_run": options.dry_run, "model": None, "parts": []}
    record["model"] = str(options.model) if options.model else "random weights"
    for part in parts:
        print(f"{part.name}: {part.shows} (at most {part.limit} s)", flush=True)
        done = run_part(part, options, log)
        record["parts"].append(done)
        write(record, options.output)
        print(f"  {done['status']} after {done['seconds']:.1f} s {done['reason']}", flush=True)
    print(f"\n{summary(record)}")
    return int(any(part["status"] != "passed" for part in record["parts"]))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a sentence and exit status 2 for what cannot be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M; else random weights")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some parts only")
    for name in ("--part", "--result", "--scratch"):  # between this process and its parts
        kind: Any = str if name == "--part" else Path
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.output = given.output.absolute()
    if given.output.exists() and not given.output.is_dir():
        parser.error(f"--output {given.output} is a file; name a folder")
    if given.model is not None:
        given.model = given.model.absolute()
        if not (given.model / "config.json").is_file():
            parser.error(f"--model {given.model} has no config.json; name a folder of SmolLM2-135M")
    if given.model is not None and given.dry_run and not given.part:
        parser.error("--model has no effect on a dry run, which uses a tiny model; leave it out")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if given.part:
        return run_here(given)
    return check(given, [part for part in PARTS if part.name in given.only])


if __name__ == "__main__":
    sys.exit(main())
