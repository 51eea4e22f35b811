"""A model of which every rank holds a part: DeepSpeed ZeRO-3 over frozen weights, no optimizer.

Only the frozen base goes into DeepSpeed. The prompt stays a plain tensor outside, so checkpoints
and optimizers know nothing of shards. Decoder layers are gathered by DeepSpeed's hooks while they
run, forward and backward; embedding and LM head are gathered here, while used. Weights are read and
cut up by `sharding_load`.

Gathering is a meeting of all ranks, so all of them must run the same layers in the same order. Who
runs the base (updates, rollouts, probes) keeps that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

_FREE_SHARE = 0.5
"""A whole base may take this share of the free memory for a rollout."""


@dataclass(frozen=True)
class ShardSettings:
    """How a base is cut up; the recipe's `distributed` says it."""

    offload: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    secondary_shards: int | None = None
    gather: Literal["auto", "whole", "layers"] = "auto"


class Shards:
    """This rank's part of a base, and how the base is made whole for a while."""

    def __init__(self, model: PreTrainedModel, engine: Any, settings: ShardSettings) -> None:
        """Take over a model that `read_sharded_model` made."""
        self.body: nn.Module = engine.module
        self._engine = engine
        self._parameters: list[Any] = list(model.parameters())
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        self._ends: list[Any] = [p for end in ends if end is not None for p in end.parameters()]
        self._gather = settings.gather

    @property
    def bytes_on_rank(self) -> int:
        """Bytes of the base's weights that this rank keeps."""
        return bytes_of(self._parameters)[0]

    @property
    def bytes_whole(self) -> int:
        """Bytes of all weights."""
        return bytes_of(self._parameters)[1]

    @property
    def rolls_out_whole(self) -> bool:
        """Whether rollouts gather the base once rather than layer by layer at every token.

        `auto` does so when the whole base takes at most half of the memory that is free. Ranks must
        agree on the answer.
        """
        if self._gather != "auto":
            return self._gather == "whole"
        return self.bytes_whole <= _FREE_SHARE * _free_bytes(self._parameters[0].device)

    def ends(self) -> AbstractContextManager[None]:
        """A context in which embedding and LM head are whole."""
        return gathered(self._ends)

    def rollout(self, whole: bool) -> AbstractContextManager[None]:
        """A context for a rollout; `whole` as all ranks agreed."""
        return self._whole() if whole else self.ends()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """The whole base on every rank, with nothing left to gather while it runs."""
        hooks = self._engine.optimizer  # what DeepSpeed calls it when there is no optimizer
        hooks._remove_module_hooks()
        try:
            with gathered(self._parameters):
                yield
        finally:
            hooks._register_deepspeed_module(hooks.module)

    def release(self) -> None:
        """Give back what a backward has left gathered."""
        for parameter in self._parameters:
            if _is_whole(parameter):
                # The first layer's input wants no gradient, so DeepSpeed waits for its backward.
                parameter.ds_active_sub_modules.clear()
                parameter.partition()


@contextmanager
def gathered(parameters: Iterable[Any]) -> Iterator[None]:
    """Parameters that are whole for a while; those of a base that is not sharded are anyway."""
    parted = [p for p in dict.fromkeys(parameters) if hasattr(p, "ds_id") and not _is_whole(p)]
    if not parted:
        yield
        return
    parted[0].all_gather(parted)
    try:
        yield
    finally:
        parted[0].partition(parted, has_been_updated=False)


def bytes_of(parameters: Iterable[Any]) -> tuple[int, int]:
    """Bytes on this rank, and on all together."""
    sizes = [(p.ds_tensor.numel(), p.ds_numel, p.ds_tensor.element_size()) for p in parameters]
    return sum(n * size for n, _, size in sizes), sum(n * size for _, n, size in sizes)


def _is_whole(parameter: Any) -> bool:
    return bool(parameter.numel())


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
