"""What the peer processes of a benchmark share: command line, line protocol, clocks and queries.

A benchmark compares two sides that must not disturb each other, and whose peak memory must be
told apart. Each side therefore lives in its own process (`python -m benchmarks.peers.NAME ...`, run
from the repository root) that says `{"event": "ready"}` once, sleeps in a blocking read of stdin,
does one unit of work for each line `{"cmd": "step"}`, answers with one JSON line, and leaves on
`{"cmd": "quit"}` or end of input. Nothing else ever reaches its stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PlainSettings = TypeVar("PlainSettings", bound="DataclassInstance")

CHATML_WITHOUT_DEFAULT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as SmolLM2 renders it, without the system message that SmolLM2's own template adds."""


def claim_stdout() -> TextIO:
    """Keep stdout for the protocol: what libraries print from now on goes to stderr.

    Returns:
        A line-buffered text stream on the original stdout.
    """
    sys.stdout.flush()
    private = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(private, "w", buffering=1, encoding="utf-8")


def emit(stream: TextIO, event: str, payload: Mapping[str, Any]) -> None:
    """Write one event as one JSON line."""
    stream.write(json.dumps({"event": event, **payload}) + "\n")
    stream.flush()


def next_command(commands: TextIO) -> str:
    """Block until the next command line and return its `cmd`; "quit" at end of input."""
    line = commands.readline()
    return str(json.loads(line)["cmd"]) if line.strip() else "quit"


def serve(unit: Callable[[], Mapping[str, Any]], ready: Mapping[str, Any], out: TextIO) -> None:
    """Answer commands until told to quit.

    Args:
        unit: Does one unit of work and returns what to report about it.
        ready: Reported once, before the first command is read (settings, versions).
        out: The stream from `claim_stdout`.
    """
    emit(out, "ready", {**ready, **memory()})
    while (command := next_command(sys.stdin)) != "quit":
        if command == "step":
            emit(out, "step", measured(unit))
        else:
            emit(out, "error", {"message": f"unknown command {command!r}, expected step or quit"})


def measured(unit: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Run `unit` and add `seconds`, `cpu_seconds` (all threads, whole process) and memory.

    A `seconds` that the unit reports itself wins: it knows what belongs to the work.
    """
    wall, cpu = time.perf_counter(), cpu_seconds()
    report = dict(unit())
    spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": cpu_seconds() - cpu}
    return {**spent, **report, **memory()}


def cpu_seconds() -> float:
    """User plus system seconds that all threads of this process have used."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def memory() -> dict[str, float]:
    """`peak_rss_mb` and `rss_mb` of this process alone, in MiB.

    Read from /proc because `ru_maxrss` survives exec: a child would report its parent's peak.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    sizes = {row.split(":")[0]: row.split()[1] for row in status.splitlines() if "kB" in row}
    return {"peak_rss_mb": int(sizes["VmHWM"]) / 1024, "rss_mb": int(sizes["VmRSS"]) / 1024}


class PhaseClock:
    """Adds up wall-clock seconds by phase name. Phases inside another phase are not counted."""

    def __init__(self) -> None:
        """Start with no phases."""
        self._seconds: dict[str, float] = {}
        self._running = False

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a context manager that charges its body to `name`."""
        return self._phase(name)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with every call charged to `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._phase(name):
                return function(*args, **kwargs)

        return timed

    def add(self, name: str, seconds: float) -> None:
        """Charge `seconds` to `name`."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self, total_seconds: float) -> dict[str, float]:
        """Return the seconds by phase plus `other`, the rest of `total_seconds`, and reset."""
        seconds, self._seconds = self._seconds, {}
        return {**seconds, "other": total_seconds - sum(seconds.values())}

    @contextmanager
    def _phase(self, name: str) -> Any:
        if self._running:
            yield
            return
        self._running = True
        start = time.perf_counter()
        try:
            yield
        finally:
            self._running = False
            self.add(name, time.perf_counter() - start)


def load_queries(path: str) -> list[dict[str, Any]]:
    """Read a JSONL file of objects with a `query` field; other fields are kept as columns.

    Raises:
        ValueError: The file has no rows, or a row has no text in `query`.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
    if not rows or not all(isinstance(row.get("query"), str) for row in rows):
        raise ValueError(f"{path} must hold at least one JSON line, each with a text in `query`.")
    return rows


def conversation(query: str, system_text: str = "") -> list[dict[str, str]]:
    """Return the chat messages of one query, with a system turn only if there is a text for it."""
    system = [{"role": "system", "content": system_text}] if system_text else []
    return [*system, {"role": "user", "content": query}]


def environment() -> dict[str, str]:
    """Return the set variables that change how threads wait or memory is allocated."""
    prefixes = ("OMP_", "GOMP_", "KMP_", "MKL_", "DNNL_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package."""
    return {name: metadata.version(name) for name in packages}


def setting(default: Any, text: str) -> Any:
    """A dataclass field with a default and the help text of its flag."""
    return field(default=default, metadata={"help": text})


def parse_settings(cls: type[PlainSettings], doc: str, argv: list[str] | None) -> PlainSettings:
    """Build the settings dataclass `cls` from command-line flags named after its fields.

    Every field needs `metadata={"help": ...}`; a field without default is a required flag, and a
    boolean is given as `--flag` or `--no-flag`.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for item in fields(cls):
        _add_flag(parser, item)
    return cls(**vars(parser.parse_args(argv)))


def _add_flag(parser: argparse.ArgumentParser, item: Field[Any]) -> None:
    options: dict[str, Any] = {"help": item.metadata["help"], "dest": item.name}
    if item.default is MISSING:
        options["required"] = True
    else:
        options["default"] = item.default
    if isinstance(item.default, bool):
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = str if item.default is MISSING else type(item.default)
    parser.add_argument("--" + item.name.replace("_", "-"), **options)


METHODS = ("prompt", "prefix", "lora")
"""What both sides can train."""
LORA_RANK = 8


@dataclass(frozen=True)
class GrpoWork:
    """What both sides of a comparison are told in the same words, so that they do the same work."""

    model: str = field(metadata={"help": "Folder of the base model."})
    queries: str = field(metadata={"help": "JSONL of training queries (field `query`)."})
    reward: str = field(metadata={"help": "TRL reward function, FILE.py:NAME or module:NAME."})
    init_text: str = setting("You are a helpful assistant.", "Text that initialises the prompt.")
    method: str = setting("prompt", "What is trained: prompt (soft tokens), prefix or lora.")
    num_virtual_tokens: int = setting(16, "Trained tokens; the init text is tiled or cut.")
    num_queries: int = setting(4, "Queries per step.")
    group_size: int = setting(8, "Completions per query.")
    max_new_tokens: int = setting(48, "Longest completion.")
    min_new_tokens: int = setting(0, "Shortest completion; equal to the longest = fixed work.")
    temperature: float = setting(1.0, "Sampling temperature.")
    lr: float = setting(0.01, "Learning rate of AdamW.")
    adam_beta2: float = setting(0.999, "Of AdamW; TRL's default.")
    max_grad_norm: float = setting(1.0, "Gradient clipping; 0 switches it off.")
    scale_rewards: str = setting("group", "Advantages over the deviation of: group, batch, none.")
    beta: float = setting(0.0, "KL coefficient; above 0 adds a forward of the bare base.")
    seed: int = setting(0, "Seed of data order, sampling and initialisation.")
    threads: int = setting(0, "torch.set_num_threads; 0 leaves torch's choice.")
    steps: int = setting(0, "Train this many steps and stop; 0 = be a worker.")
    heldout: str = setting("", "JSONL of held-out queries, for --steps.")
    eval_every: int = setting(1, "Evaluate before the first and after every n-th step.")
    heldout_samples: int = setting(1, "Completions per held-out query.")
    eval_seed: int = setting(1234, "Sampling seed of every evaluation.")
    json: str = setting("", "Where --steps writes its result; empty = stdout.")
