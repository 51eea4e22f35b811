"""Parts that run what exists: the test suites on the device, and the kernel benchmark."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.world import PartFailedError, World, require

ROOT = Path(__file__).resolve().parent.parent.parent
KERNEL_TESTS = ("tests/kernels",)
CUDA_TESTS = (
    "tests/engines",
    "tests/test_policy.py",
    "tests/training",
    "tests/model/forward",
    "tests/model/test_base.py",
    "tests/model/test_fingerprint.py",
)
DRY_TESTS = {
    "kernels": ("tests/kernels/triton/test_attention_decode.py::test_low_precision",),
    "cuda": ("tests/test_policy.py::test_the_own_prompt_is_the_default",),
}
COUNTED = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|deselected)")


def kernel_tests(world: World) -> dict[str, Any]:
    """Every kernel test; on a GPU the kernels are compiled, in a dry run interpreted."""
    paths = DRY_TESTS["kernels"] if world.dry_run else KERNEL_TESTS
    return _pytest(world, paths, {})


def cuda_tests(world: World) -> dict[str, Any]:
    """Engine, policy and training tests with their tiny bases on the GPU, and those marked gpu."""
    paths = DRY_TESTS["cuda"] if world.dry_run else CUDA_TESTS
    return _pytest(world, paths, {"RLPROMPT_TEST_DEVICE": world.device.type})


def _pytest(world: World, paths: tuple[str, ...], extra: dict[str, str]) -> dict[str, Any]:
    """Run tests; counts, the names of failures, and the end of each failure's message.

    Raises:
        PartFailedError: a test failed, or none ran.
    """
    world.require_device()
    if importlib.util.find_spec("pytest") is None:
        raise PartFailedError("pytest is not installed (scripts/gpu_wheels.sh)", {})
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-m", "not model and not multi_gpu", *paths]
    if importlib.util.find_spec("xdist") is not None:
        # Processes share the device; each holds a context of half a GiB and compiles for itself.
        workers = 1 if world.dry_run else min(8, os.cpu_count() or 1)
        command += ["-n", str(workers if workers > 1 else 0), "--dist", "load"]
    if importlib.util.find_spec("pytest_timeout") is None:
        command += ["-o", "timeout=", "-W", "ignore::pytest.PytestConfigWarning"]
    environment = {**os.environ, **extra}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    sys.stdout.write(done.stdout[-20_000:] + done.stderr[-4_000:])
    lines = done.stdout.splitlines()
    counts = {word: int(count) for count, word in COUNTED.findall(lines[-1] if lines else "")}
    failures = [line[:300] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    figures = {"paths": list(paths), **counts, "failures": failures[:60]}
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = f"{len(failures)} of the tests failed" if failures else " ".join(said[-1:])
        raise PartFailedError(reason or f"pytest ended with {done.returncode}", figures)
    return require(figures, **{"some test passed": counts.get("passed", 0) > 0})


def kernel_speed(world: World) -> dict[str, Any]:
    """`bench_kernels --quick` behind its correctness gate; in a dry run the gate alone."""
    world.require_device()
    if importlib.util.find_spec("triton") is None:
        raise PartFailedError("triton is not installed", {})
    import torch

    from benchmarks import bench_kernels
    from benchmarks.kernel_peers import plain_flex
    from rlprompt.kernels.operands import Heads

    if world.dry_run:
        bench_kernels.HEADS["tiny"] = Heads(4, 2, 16)
        points = [bench_kernels.Point(kind, "tiny", 2, 5, 7) for kind in ("forward", "decode")]
        errors = bench_kernels.gate(points, "cpu", plain_flex, torch.float32)
        holds = {f"results of {name}": error < 1e-5 for name, error in errors.items()}
        return require({"errors": errors}, **holds)
    target = world.scratch / "kernels.json"
    arguments = ["--quick", "--json", str(target)]
    if importlib.util.find_spec("matplotlib") is not None:
        arguments += ["--plot", str(world.output / "kernels.png")]
    code = bench_kernels.main(arguments)
    figures = json.loads(target.read_text()) if target.exists() else {}
    return require(figures, **{"results of kernels and peers": code == 0})
