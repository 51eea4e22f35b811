"""The side of a benchmark that starts peer processes and gives them work (see `worker.py`)."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """A peer process that does one unit of work per command."""

    def __init__(
        self, name: str, module: str, flags: dict[str, Any], python: str = sys.executable
    ) -> None:
        """Start it, by the interpreter that has its packages, and wait until it is ready."""
        self.name = name
        command = [python, "-m", f"benchmarks.peers.{module}"]
        for key, value in flags.items():
            command += [f"--{key}", str(value)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self.ready = self._read()
        self.steps: list[dict[str, Any]] = []

    def step(self, *, counts: bool) -> dict[str, Any]:
        """One unit of work; `counts` = it belongs to the medians."""
        assert self._process.stdin is not None
        self._process.stdin.write('{"cmd": "step"}\n')
        self._process.stdin.flush()
        report = self._read()
        if counts:
            self.steps.append(report)
        return report

    def quit(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.write('{"cmd": "quit"}\n')
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def median(self, *keys: str) -> float:
        """Median over counted steps of a nested number."""
        values = []
        for step in self.steps:
            value: Any = step
            for key in keys:
                value = value.get(key, 0.0)
            values.append(float(value))
        return statistics.median(values)

    def phases(self) -> dict[str, float]:
        """Median seconds by phase."""
        names = dict.fromkeys(name for step in self.steps for name in step["phases"])
        return {name: self.median("phases", name) for name in names}

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            lines = self._log.readlines()[-15:]
            if lines and lines[-1].startswith("error: "):  # one sentence, such as a missing extra
                raise SystemExit(lines[-1].rstrip("\n"))
            raise SystemExit(f"the {self.name} process ended:\n{''.join(lines)}")
        report: dict[str, Any] = json.loads(line)
        if report["event"] == "error":
            raise SystemExit(f"{self.name}: {report['message']}")
        return report


def model_folder() -> Path:
    """The embedded default model, fetched if need be."""
    from rlprompt.model.files.fetch import fetch

    return fetch("smollm2-135m", progress=lambda line: print(line, file=sys.stderr))


def write_queries(folder: Path) -> Path:
    """The training queries of `everyday.jsonl` in a file of their own."""
    rows = (ROOT / "recipes/data/everyday.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [row for row in rows if json.loads(row)["split"] == "train"]
    path = folder / "queries.jsonl"
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return path
