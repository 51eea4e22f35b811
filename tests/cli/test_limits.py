"""A machine that has not enough of something is told of in one sentence, with exit code 1."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlprompt.errors import InputError, limit_reached, machine_fault
from rlprompt.model.files.fetch import cache_dir
from tests.cli.runs import rlprompt

ROOT = Path(__file__).parents[2]
NOBODY = 65_534


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "not enough memory (MemoryError"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "not enough memory",
        ),
        (ImportError("libx.so: failed to map segment from shared object"), "not enough memory"),
        (
            SystemError("<function f at 0x7f> returned NULL without setting an exception"),
            "not enough memory",
        ),
        (SystemError("error return without exception set"), "not enough memory"),
        (OSError(errno.EMFILE, "Too many open files", "/x"), "too many files are open"),
        (RuntimeError("can't start new thread"), "no more threads"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_limits_are_told(error: Exception, words: str) -> None:
    told = limit_reached(error)
    assert told is not None and words in told
    assert machine_fault(error) == told


def test_what_is_no_fault_of_the_machine_stays_an_exception() -> None:
    assert machine_fault(ValueError("memory of an elephant")) is None
    assert machine_fault(OSError("a library's own words")) is None
    assert limit_reached(PermissionError(errno.EACCES, "Permission denied", "/x")) is None
    denied = PermissionError(errno.EACCES, "Permission denied", "/x")
    assert (
        machine_fault(denied) == "'/x' cannot be used (Permission denied); mend that and try again"
    )


@pytest.mark.parametrize("limit", ["ulimit -v 600000", "ulimit -n 3"])
def test_a_command_under_a_limit_ends_in_one_line(limit: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f'{limit}; "$PYTHON" -m rlprompt plan nothing.yaml'],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "python" in done.stderr.split(":")[0] or "Fatal Python error" in done.stderr:
        pytest.skip("the interpreter itself does not start under this limit")
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLPROMPT_CACHE", "~no-such-user-of-this-test/x")
    with pytest.raises(InputError, match="set RLPROMPT_CACHE"):
        cache_dir()
    assert rlprompt("model", "list").code == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("doctor",), 1, "cannot be written"),
        (("model", "list"), 0, "smollm2-135m"),
        (("plan", "{closed}/recipe.yaml"), 1, "Permission denied"),
        (("chat", "{closed}/artifact", "-q", "x"), 1, "Permission denied"),
    ],
    ids=["doctor", "models", "recipe", "artifact"],
)
def test_a_folder_that_may_not_be_looked_into(
    arguments: tuple[str, ...],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = tmp_path / "closed"
    monkeypatch.setenv("RLPROMPT_CACHE", str(closed / "cache"))
    filled = [argument.format(closed=closed) for argument in arguments]
    rlprompt(*filled)  # imports what it needs, which only the superuser may be able to read
    closed.mkdir(mode=0)
    with as_nobody():
        shown = rlprompt(*filled)
    assert (shown.code, words in shown.out + shown.err) == (code, True), shown
    assert not shown.err or len(shown.err.splitlines()) == 1


@contextmanager
def as_nobody() -> Iterator[None]:
    """What the superuser may, others may not."""
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)
