"""Where and in which precision a base runs: the choices behind `device: auto` and `dtype: auto`."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import torch

from rlprompt.cpu_share import allowed_cpus
from rlprompt.errors import InputError

logger = logging.getLogger(__name__)

CPU_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""/proc/cpuinfo flags of cores that multiply bfloat16 in hardware (x86, x86, Arm)."""


def choose_device(name: str) -> torch.device:
    """The device that `name` stands for; `auto` is CUDA when there is a GPU, else the CPU.

    Raises:
        InputError: If the name is no device, names a GPU that this machine does not have, or is
            `auto` in a Slurm job that asked for GPUs of which torch sees none.
    """
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            _refuse_job_with_gpus()
        logger.info("device: %s (auto)", device)
        return device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"model.device is {name!r}, which is no device: write auto, cpu, cuda or cuda:N."
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(
            f"model.device is {name!r}, which rlprompt does not run on: write auto, cpu or cuda."
        )
    if device.type == "cuda":
        _check_cuda(name, device)
    return device


def use_allowed_threads() -> None:
    """Have torch use no more threads than this process can run at once.

    Torch counts the cores that a process may run on and knows neither quotas nor Slurm. What
    OMP_NUM_THREADS says stays, and so does a smaller number. The number stays as it is from then
    on, whatever else the machine does: it decides the order of sums.
    """
    allowed = allowed_cpus()
    if "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() <= allowed:
        return
    logger.info(
        "threads: %d, the share of this process (torch: %d)", allowed, torch.get_num_threads()
    )
    torch.set_num_threads(allowed)


def _refuse_job_with_gpus() -> None:
    """Refuse the CPU where GPUs are paid for: a run on it would be a hundred times as slow."""
    names = ("RLPROMPT_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE")
    asked = next((os.environ[name] for name in names if os.environ.get(name)), "0")
    if asked == "0":
        return
    node = socket.gethostname()
    if torch.version.cuda or torch.version.hip:
        why = "sees none; look at nvidia-smi and the driver there"
        advice = "leave out the node (--exclude)"
    else:
        why = "is built for CPU only"
        advice = "run `bash scripts/setup.sh --cuda cu130` (or the CUDA of the nodes' driver)"
    raise InputError(
        f"this job asked for {asked} GPU(s) on {node}, but torch {torch.__version__} {why}: "
        f"{advice}, or set model.device=cpu and ask for no GPUs."
    )


def _check_cuda(name: str, device: torch.device) -> None:
    if not torch.cuda.is_available():
        built = "sees no GPU" if torch.version.cuda else "is built for CPU only"
        raise InputError(
            f"model.device is {name!r}, but this machine's torch {torch.__version__} {built}: "
            "write device: cpu (or auto), or install a CUDA build on a machine with a GPU."
        )
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise InputError(
            f"model.device is {name!r}, but this machine has {count} GPU(s): "
            f"write cuda:0 to cuda:{count - 1}."
        )


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `name` stands for on `device`.

    `auto` is bfloat16 where the hardware multiplies it (CUDA from Ampere on; CPUs with AVX512_BF16,
    AMX or Arm BF16), else float32, because emulated bfloat16 is slower than float32.

    Raises:
        InputError: If the device cannot compute in the dtype that was asked for.
    """
    if name == "auto":
        dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
        logger.info("dtype: %s (auto, on %s)", str(dtype).removeprefix("torch."), device)
        return dtype
    dtype = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[name]
    if dtype == torch.float16 and device.type == "cpu":
        raise InputError(
            "model.dtype is float16 on the CPU, where it overflows and is slow: "
            "write dtype: bfloat16, float32 or auto."
        )
    if dtype == torch.bfloat16 and not has_fast_bfloat16(device):
        if device.type == "cuda":
            raise InputError(
                f"model.dtype is bfloat16, but {torch.cuda.get_device_name(device)} cannot compute "
                "in it: write dtype: float32, float16 or auto."
            )
        logger.warning("dtype: this CPU only emulates bfloat16; float32 is likely faster")
    return dtype


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return not CPU_BFLOAT16_FLAGS.isdisjoint(_cpu_flags())


def _cpu_flags() -> frozenset[str]:
    """The instruction-set flags of this machine's CPU; empty where /proc/cpuinfo is missing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flag_lines = (line for line in lines if line.lower().startswith(("flags", "features")))
    return frozenset(next(flag_lines, ":").partition(":")[2].split())
