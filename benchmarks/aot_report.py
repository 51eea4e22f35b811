"""Compile the shipped configurations of the Triton kernels for GPUs that need not be there.

    python benchmarks/aot_report.py [--json FILE] [--arch sm_80 ...] [--kernel forward ...]
        [--jobs N]

For the heads of real models, prints registers per thread, spilled bytes, shared memory and how many
matrix instructions the code has, and exits with 1 when a kernel spills, needs more shared memory
than its architecture has, or has no matrix instructions. It says nothing about speed, and nothing
about results: tests in the interpreter do.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Read by Triton when it is imported: under the interpreter there would be nothing to compile.
os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_ALWAYS_COMPILE"] = "1"
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
if importlib.util.find_spec("triton") is None:
    sys.exit("error: Triton is not installed; run `pip install 'rlprompt[triton]'`")

import argparse
import contextlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlprompt.kernels.operands import Heads, Scoring
from rlprompt.kernels.triton.attention_launch import KERNELS, constants

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one block may have: CUDA C++ Programming Guide, table of technical
specifications per compute capability; CDNA3 ISA reference, LDS."""


class Model(NamedTuple):
    """Heads of a model that stand for its kind."""

    heads: Heads
    softcap: float | None = None
    window: int | None = None


MODELS = {
    "smollm2-135m": Model(Heads(9, 3, 64)),  # three query heads per key head: no power of two
    "phi-2": Model(Heads(32, 32, 80)),  # head dim padded to 128, no sharing
    "phi-3-mini": Model(Heads(32, 32, 96), window=2047),
    "qwen3-8b": Model(Heads(32, 8, 128)),
    "gemma-2-27b": Model(Heads(32, 16, 128), softcap=50.0, window=4096),
    "gemma-2-9b": Model(Heads(16, 8, 256), softcap=50.0, window=4096),
}
FLOAT32_MODELS = ("smollm2-135m", "qwen3-8b", "gemma-2-27b")
"""Float32 is for checking; its tiles exist up to head dim 128."""

SIGNATURE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ACCUMULATED = {"LSE", "DELTA", "STATE", "TOPS", "TOTALS"}
INTEGER = {"TABLE", "POSITIONS", "FIRSTS", "LENGTHS"}
ALIGNED = ("stride", "head", "row")
"""How names of integer arguments end that are multiples of 16 elements in practice."""


class Job(NamedTuple):
    """One compilation."""

    kernel: str
    arch: str
    model: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Row:
    """What the compiler said."""

    kernel: str
    arch: str
    config: str
    model: str
    registers: int
    """Per thread; on AMD vector registers, accumulation registers included."""
    spill_bytes: int
    """Stores and loads; on AMD what they take of private memory."""
    shared_bytes: int
    mma: int
    """Matrix instructions in the code."""

    def faults(self) -> list[str]:
        """Why this may not ship."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            found.append(f"needs {self.shared_bytes} bytes of shared memory")
        if self.mma == 0:
            found.append("has no matrix instructions")
        return found


def jobs(archs: Iterable[str], kernels: Iterable[str]) -> Iterator[Job]:
    """All that ships: float16 has the tiles and instructions of bfloat16, so one model shows it."""
    wanted = [(model, torch.bfloat16) for model in MODELS]
    wanted += [(model, torch.float32) for model in FLOAT32_MODELS]
    wanted += [("smollm2-135m", torch.float16)]
    for arch in archs:
        for kernel in kernels:
            for model, dtype in wanted:
                yield Job(kernel, arch, model, dtype)


class Source(NamedTuple):
    """What the compiler is given."""

    kernel: ASTSource
    """With the types of its arguments."""
    options: dict[str, Any]
    config: str
    """The configuration in words."""


def source(job: Job) -> Source:
    """A kernel with all that its compilation depends on."""
    heads, softcap, window = MODELS[job.model]
    scoring = Scoring(heads.dim**-0.5, softcap, window)
    backend = TARGETS[job.arch].backend
    tile, constexprs = constants(job.kernel, backend, job.dtype, heads, scoring)
    kernel = KERNELS[job.kernel]
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
            continue
        if name.isupper():
            signature[name] = "*" + pointee(job, name)
        else:
            signature[name] = "i32"
        if name.isupper() or name.endswith(ALIGNED):
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    config = (
        f"{SIGNATURE[job.dtype]} D{heads.dim} {tile.rows}x{tile.keys} w{tile.warps} s{tile.stages}"
    )
    return Source(ASTSource(kernel, signature, constexprs, attributes), options, config)


def pointee(job: Job, name: str) -> str:
    """What a pointer argument points at."""
    if name in INTEGER:
        return "i32"
    partial_sums = job.kernel == "backward_prefix" and name in ("DK", "DV")
    return "fp32" if name in ACCUMULATED or partial_sums else SIGNATURE[job.dtype]


def compile_one(job: Job) -> Row:
    """Compile down to machine code and read what the assembler says of it."""
    built, options, config = source(job)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        done = triton.compile(built, target=TARGETS[job.arch], options=options)
    if TARGETS[job.arch].backend == "hip":
        code = done.asm["amdgcn"]
        registers = numbers(r"\.vgpr_count:\s+(\d+)", code)
        scratch = numbers(r"\.private_segment_fixed_size:\s+(\d+)", code)
        spilled = max(scratch, 4 * numbers(r"\.vgpr_spill_count:\s+(\d+)", code))
        matrix = r"\bv_mfma"
    else:
        code = done.asm["ptx"]
        registers = numbers(r"Used (\d+) registers", log.getvalue())
        spilled = numbers(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
        matrix = r"\b(?:mma\.sync|wgmma\.mma_async)"
    return Row(
        job.kernel,
        job.arch,
        config,
        job.model,
        registers,
        spilled,
        int(done.metadata.shared),
        len(re.findall(matrix, code)),
    )


def numbers(pattern: str, text: str) -> int:
    """The sum of all numbers that a pattern finds; no number at all is an error."""
    found = re.findall(pattern, text)
    if not found:
        raise RuntimeError(f"the compiler's output does not have {pattern!r}")
    return sum(map(int, found))


HEADER = ("kernel", "arch", "config", "model", "regs", "spill", "shared", "mma")
WIDTHS = "{:<15} {:<6} {:<22} {:<12} {:>4} {:>5} {:>6} {:>4}"


def compile_all(wanted: list[Job], processes: int) -> list[Row]:
    """In order, each row printed when it is there."""
    print(WIDTHS.format(*HEADER))
    rows = []
    with ProcessPoolExecutor(processes) as pool:
        for row in pool.map(compile_one, wanted):
            print(WIDTHS.format(*asdict(row).values()), flush=True)
            rows.append(row)
    return rows


def summary(rows: list[Row]) -> Iterator[str]:
    """Per kernel and architecture, over all configurations: a Markdown table."""
    yield "| kernel | arch | compiled | registers | spilled | most shared memory | mma |"
    yield "|---|---|---|---|---|---|---|"
    for kernel, arch in dict.fromkeys((row.kernel, row.arch) for row in rows):
        some = [row for row in rows if (row.kernel, row.arch) == (kernel, arch)]
        registers, mma = [r.registers for r in some], [r.mma for r in some]
        shared, limit = max(r.shared_bytes for r in some) / 1024, SHARED_LIMIT[arch] / 1024
        yield (
            f"| {kernel} | {arch} | {len(some)} | {min(registers)} to {max(registers)} "
            f"| {sum(r.spill_bytes for r in some)} | {shared:.0f} of {limit:.0f} KB "
            f"| {min(mma)} to {max(mma)} |"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file as a list")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    given = parser.parse_args(arguments)
    rows = compile_all(list(jobs(given.arch, given.kernel)), given.jobs)
    print("", *summary(rows), "", sep="\n")
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    faults = [(row, fault) for row in rows for fault in row.faults()]
    for row, fault in faults:
        print(f"FAULT: {row.kernel} {row.arch} {row.config} ({row.model}) {fault}", file=sys.stderr)
    print(f"{len(rows)} compiled with Triton {triton.__version__}, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
