"""Reading a model of which every rank keeps its part; the only module that imports DeepSpeed.

Weights are cut up while they are read, one tensor at a time: no rank ever holds more than its part
and one tensor.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from rlprompt.errors import InputError
from rlprompt.model.sharded.shards import Shards, ShardSettings, bytes_of, gathered

logger = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3  # of <malloc.h>
_LARGE_BLOCK = 1 << 20


def read_sharded_model(
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    settings: ShardSettings,
) -> tuple[PreTrainedModel, Shards]:
    """A model of which this rank has its part only.

    The first rank reads the weights, one tensor at a time, and every rank keeps its part.

    Args:
        folder: the folder with the safetensors files.
        config: the configuration of the model.
        dtype: the dtype of weights and activations.
        settings: how it is cut up.

    Raises:
        InputError: DeepSpeed is missing or cannot run here, or a weight of the model is not in the
            files under its own name.
    """
    deepspeed = _deepspeed("distributed.base is sharded", "set distributed.base: replicated")
    if settings.offload == "nvme" and not _has_async_io():
        raise InputError(
            "distributed.offload is nvme, which needs DeepSpeed's async_io, and that cannot be "
            "built here; install libaio-dev and a C++ compiler, or set distributed.offload: cpu"
        )
    plan = _plan(settings, dtype)
    model = _empty_model(deepspeed, AutoModelForCausalLM, config, plan)
    _fill(deepspeed, model, folder, dtype, "set distributed.base: replicated")
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_apply, module)  # type: ignore[method-assign]
    root = _Root(model.get_decoder())
    engine, *_ = deepspeed.initialize(model=root, config=plan)
    shards = Shards(model, engine, settings)
    logger.info(
        "base in shards: %.1f MB on this rank, %.1f MB in all",
        shards.bytes_on_rank / 1e6,
        shards.bytes_whole / 1e6,
    )
    return model, shards


def read_sharded_classifier(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, nn.Module]:
    """A sequence classifier of which this rank has its part only.

    Args:
        folder: the folder with the safetensors files.
        config: the configuration of the model.
        dtype: the dtype of weights and activations.

    Returns:
        The model, for its configuration and device, and what all ranks call together in its place.

    Raises:
        InputError: as for `read_sharded_model`.
    """
    advice = "set sharded: false"
    deepspeed = _deepspeed("sharded is true", advice)
    plan = _plan(ShardSettings(), dtype)
    model = _empty_model(deepspeed, AutoModelForSequenceClassification, config, plan)
    _fill(deepspeed, model, folder, dtype, advice)
    engine, *_ = deepspeed.initialize(model=_Root(model), config=plan)
    body: nn.Module = engine.module
    held, whole = bytes_of(model.parameters())
    logger.info("preference model in shards: %d bytes on this rank, %d in all", held, whole)
    return model, body


class _FrozenProduct(torch.autograd.Function):
    """A linear layer of a sharded base that keeps nothing for its backward.

    The weight is whole again by then: DeepSpeed gathers it before a module's backward. Plain torch
    would keep a view of the gathered weight, DeepSpeed's own stand-in the input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        with gathered([ctx.layer.weight]):
            return grads[0] @ ctx.layer.weight, None


def _apply(layer: nn.Linear, x: Tensor) -> Tensor:
    out: Tensor = _FrozenProduct.apply(x, layer)  # type: ignore[no-untyped-call]
    return out


class _Root(nn.Module):
    """What DeepSpeed takes for the whole model: its steps begin and end here."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)


def _deepspeed(reason: str, advice: str) -> Any:
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise InputError(
            f"{reason}, which needs DeepSpeed; run `pip install deepspeed`, or {advice}"
        ) from error
    # Would be compiled for a minute at first use; it only speeds up sums on one CPU machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed


def _has_async_io() -> bool:
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    return bool(builder.is_compatible(verbose=False))


def _plan(settings: ShardSettings, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration: shard everything, keep nothing that is not in use."""
    zero: dict[str, Any] = {
        "stage": 3,
        # By default small tensors, and small models whole, would stay on every rank.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "overlap_comm": torch.cuda.is_available(),
        # Else `torch.nn.functional.linear` is replaced for the whole process.
        "memory_efficient_linear": False,
    }
    if settings.offload != "none":
        zero["offload_param"] = {"device": settings.offload, "pin_memory": True}
        if settings.nvme_path is not None:
            zero["offload_param"]["nvme_path"] = settings.nvme_path
    if settings.secondary_shards is not None:
        zero["zero_hpz_partition_size"] = settings.secondary_shards
    plan: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
    }
    if dtype != torch.float32:
        plan["bf16" if dtype == torch.bfloat16 else "fp16"] = {"enabled": True}
    return plan


def _empty_model(
    deepspeed: Any, kind: Any, config: PretrainedConfig, plan: dict[str, Any]
) -> PreTrainedModel:
    """The modules with weights that are cut up as soon as they are made, holding anything."""
    _free_at_once()
    initialization = importlib.import_module("transformers.initialization")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
        next((key for key in ("bf16", "fp16") if key in plan), ""), torch.float32
    )
    with (
        initialization.no_init_weights(),
        deepspeed.zero.Init(config_dict_or_path=plan),
    ):
        model = kind.from_config(config, dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    model.tie_weights()
    model.requires_grad_(False).eval()
    return model


def _free_at_once() -> None:
    """Have glibc give large blocks back to the system as soon as they are freed.

    Else it keeps them for later, and a weight that is gathered and cut up again leaves a hole of
    its size between others' shares: after reading SmolLM2 on two ranks, more than its other half.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other systems' libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def _fill(
    deepspeed: Any, model: PreTrainedModel, folder: Path, dtype: torch.dtype, advice: str
) -> None:
    """Read each weight on the first rank and give every rank its part."""
    files = _where(folder)
    is_first = torch.distributed.get_rank() == 0
    for name, parameter in model.named_parameters():
        if name not in files:
            raise InputError(
                f"the weights in {folder} have no tensor '{name}', so this model cannot be read "
                f"in shards; {advice}"
            )
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if is_first:
                with safe_open(files[name], framework="pt") as opened:
                    parameter.data.copy_(opened.get_tensor(name))


def _where(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), path)
    return found
