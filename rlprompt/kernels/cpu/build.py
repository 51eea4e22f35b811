"""Building the C++ kernels on first use.

The sources ship with the package; what they become is kept in the cache of rlprompt under a hash of
sources, compiler, flags, torch and processor, so that each of them builds once. Nothing is ever
built or loaded that was not asked for, and a machine without a compiler runs the plain path.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = (
    "elementwise.cpp",
    "head.cpp",
    "product.cpp",
    "low_rank.cpp",
    "low_rank_backward.cpp",
    "decode_attention.cpp",
    "decode.cpp",
    "tree.cpp",
)
_HEADERS = (
    "common.h",
    "decode_attention.h",
    "elementwise.h",
    "low_rank.h",
    "pairs.h",
    "product.h",
    "team.h",
)
_HERE = Path(__file__).parent
_TIMEOUT_SECONDS = 600
_SCRATCH = ".part-"
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-ignored-attributes",
)


class BuildError(Exception):
    """Why the kernels cannot be had here, in one line."""


@cache
def load(folder: Path) -> None:
    """Make `torch.ops.rlprompt_cpu` available; builds into `folder` at the first call.

    Raises:
        BuildError: this is not Linux on x86-64 or ARM, there is no compiler, or it fails.
    """
    library = _library(folder)
    made = not _exists(library)
    if made:
        _build(library)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        problem = _last_line(str(error))
        if made:
            raise BuildError(f"{library} cannot be loaded ({problem})") from error
        # A disk that was full, or a power cut: what is in the cache is no library.
        logger.warning("the CPU kernels in the cache are damaged (%s): building them anew", problem)
        _build(library, anew=True)
        try:
            torch.ops.load_library(str(library))
        except OSError as second:
            problem = _last_line(str(second))
            raise BuildError(f"{library} cannot be loaded ({problem})") from second


def is_built(folder: Path) -> bool:
    """Whether `load` would find them built already.

    Raises:
        BuildError: as `load`, for want of a compiler.
    """
    return _exists(_library(folder))


def _exists(library: Path) -> bool:
    try:
        return library.exists()
    except OSError as error:  # a folder that may not be looked into
        raise BuildError(f"{library.parent} cannot be read ({error.strerror})") from error


def compiler() -> str:
    """The C++ compiler: `CXX`, or g++.

    Raises:
        BuildError: there is none, or the system is one that the kernels are not written for.
    """
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise BuildError(f"they are not written for {platform.system()} on {platform.machine()}")
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise BuildError(f"there is no C++ compiler ({name}); install g++")
    return found


def _command() -> list[str]:
    """The compiler with its flags, without files."""
    include = Path(torch.__file__).parent / "include"
    if not (include / "torch" / "library.h").exists():
        raise BuildError("this torch comes without C++ headers")
    wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    paths = ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    return [compiler(), *_FLAGS, "-march=native", *wide, abi, *paths]


def _library(folder: Path) -> Path:
    return folder / f"rlprompt_cpu_{_key()}.so"


def _key() -> str:
    """A hash of everything that decides what comes out."""
    command = _command()
    parts = [(_HERE / name).read_bytes() for name in (*SOURCES, *_HEADERS)]
    parts += [" ".join(command).encode(), torch.__version__.encode(), _processor().encode()]
    parts.append(_run([command[0], "--version"]).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(kept)))


def _build(library: Path, anew: bool = False) -> None:
    """Compile all sources at once and link them; the file appears whole or not at all."""
    import fcntl  # POSIX only, as `compiler` has made sure

    logger.info("building the CPU kernels, once for this machine (about half a minute)")
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with (library.parent / "lock").open("w") as lock:
            before = library.stat().st_ino if anew and library.exists() else None
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("waiting for another process that builds them")
                fcntl.flock(lock, fcntl.LOCK_EX)
            # Of two processes, the second finds it done.
            if not library.exists() or library.stat().st_ino == before:
                for left_over in library.parent.glob(f"{_SCRATCH}*"):
                    shutil.rmtree(left_over, ignore_errors=True)  # of a process that was killed
                _compile(library)
    except OSError as error:
        raise BuildError(f"{library.parent} cannot be written ({error.strerror})") from error


def _compile(library: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=library.parent) as scratch:
        objects = [str(Path(scratch) / f"{name}.o") for name in SOURCES]
        commands = [
            [*_command(), "-c", str(_HERE / name), "-o", out]
            for name, out in zip(SOURCES, objects, strict=True)
        ]
        run = partial(_run, scratch=scratch)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))
        whole = Path(scratch) / library.name
        found = str(Path(torch.__file__).parent / "lib")
        link = ["-shared", "-fopenmp", *objects, f"-L{found}", "-ltorch_cpu", "-lc10"]
        run([compiler(), *link, "-o", str(whole)])
        with whole.open("rb+") as file:
            os.fsync(file.fileno())  # its name must not reach the disk before its content
        os.replace(whole, library)


def _run(command: list[str], scratch: str | None = None) -> str:
    """The output of a command, whose own temporary files go to `scratch` if that is given."""
    environment = os.environ if scratch is None else {**os.environ, "TMPDIR": scratch}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run ({_last_line(str(error))})") from error
    if done.returncode:
        logger.debug("%s", done.stderr)
        wrong = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise BuildError(f"{command[0]} fails ({wrong[:200]})")
    return done.stdout


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:200] if text.strip() else "no message"
