"""The process-wide random generators, which user rewards may draw from: seed, keep, put back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the ground must be there without torch
    from torch import Tensor


def seed_global_random(seed: int) -> None:
    """Seed the process-wide generators, so that rewards that draw from them can be repeated."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def global_random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of the process-wide generators, which user rewards may draw from."""
    import torch

    version, internal, gauss = random.getstate()
    tensors = {"random/torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": [version, list(internal), gauss], "numpy": _numpy_state()}


def restore_global_random_state(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Put the generators back where `global_random_state` found them."""
    import numpy
    import torch

    torch.set_rng_state(tensors["random/torch"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, place, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype="uint32"), place, has_gauss, cached))


def _numpy_state() -> list[Any]:
    import numpy

    state: Any = numpy.random.get_state(legacy=True)
    name, keys, place, has_gauss, cached = state
    return [name, keys.tolist(), place, has_gauss, cached]
