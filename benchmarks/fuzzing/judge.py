"""Runs one hostile input under a watchdog, and says what came of it."""

from __future__ import annotations

import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rlprompt.errors import InputError

SECRET = "s3cr3t-9f2c71d0"
"""Stands where a secret would; no sentence may hold it."""
LONGEST_SENTENCE = 1500
_SPARE_BYTES = 6 << 30
_GROWTH_BYTES = 300 << 20
_CHECK_EVERY = 100
_WALL_FACTOR = 6  # by the clock, on a machine that others use


@dataclass(frozen=True)
class Case:
    """One input."""

    label: str
    """What it is, in a few words."""
    run: Callable[[], object]
    """Reads it; raises InputError where it is refused."""
    invalid: bool = False
    """Whether it is known to be wrong, so that accepting it is a fault."""


@dataclass
class Findings:
    """What came of the inputs of one category."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: int = 0
    hangs: int = 0
    leaks: int = 0
    silent: int = 0
    seconds: float = 0.0
    examples: dict[str, str] = field(default_factory=dict)
    """One label for each kind of fault."""

    def fault(self, kind: str, what: str, case: Case) -> None:
        """Count a fault, and keep the first of its kind."""
        setattr(self, kind, getattr(self, kind) + 1)
        self.examples.setdefault(f"{kind}: {what}", case.label[:200])

    def row(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), "seconds": round(self.seconds, 1)}


class Hang(BaseException):
    """The watchdog's."""


@contextmanager
def watchdog(seconds: int) -> Iterator[None]:
    """A block that ends in `Hang` when it takes longer."""

    def end(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise Hang

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def limit_memory() -> None:
    """Give this process so much more memory and no more, so that a bomb fails in place of swap."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _SPARE_BYTES, hard))


def judge(cases: Iterator[Case], count: int, seconds: int) -> Findings:
    """Run `count` cases; each may take `seconds` of this process, by the clock a few times that."""
    found = Findings()
    begun = time.monotonic()
    open_files, memory = 0, 0
    for number in range(count):
        case = next(cases)
        _judge_one(case, found, seconds)
        if number % _CHECK_EVERY == 0 and number:
            now = _open_files()
            if not open_files:
                open_files, memory = now, _resident_bytes()
            elif now > open_files + 2:
                found.fault("leaks", f"{now - open_files} open files", case)
                open_files = now
    if open_files and _resident_bytes() > memory + _GROWTH_BYTES:
        grown = (_resident_bytes() - memory) >> 20
        found.fault("leaks", f"{grown} MiB of memory", Case("the whole category", lambda: None))
    found.seconds = time.monotonic() - begun
    return found


def _judge_one(case: Case, found: Findings, seconds: int) -> None:
    found.inputs += 1
    begun = time.process_time()
    try:
        with watchdog(_WALL_FACTOR * seconds):
            case.run()
    except InputError as error:
        found.refused += 1
        sentence = str(error)
        if len(sentence.splitlines()) != 1 or not 10 < len(sentence) <= LONGEST_SENTENCE:
            found.fault("crashes", f"no one sentence: {sentence[:80]!r}", case)
        if SECRET in sentence:
            found.fault("leaks", f"a secret: {sentence[:120]!r}", case)
    except Hang:
        found.fault("hangs", f"more than {_WALL_FACTOR * seconds} s", case)
        return
    except BaseException as error:
        found.fault("crashes", _place(error), case)
    else:
        found.accepted += 1
        if case.invalid:
            found.fault("silent", "accepted", case)
    if time.process_time() - begun > seconds:
        found.fault("hangs", f"more than {seconds} s of this process", case)


def _place(error: BaseException) -> str:
    """Type of an exception, and the deepest line of rlprompt that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}rlprompt{os.sep}" in frame.filename] or frames
    where = f"{Path(own[-1].filename).name}:{own[-1].name}" if own else "?"
    return f"{type(error).__name__} at {where} ({str(error)[:100]})"


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
