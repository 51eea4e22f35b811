"""Where and how a part of the GPU check runs, and how it says that something is wrong.

torch is imported where it is used: a part that cannot import it says so, and no part waits for it
in vain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class World:
    """Where and how a part runs."""

    dry_run: bool
    """On the CPU, in Triton's interpreter, with tiny shapes."""
    model: Path | None
    """A folder of SmolLM2-135M; None = random weights of its shape."""
    output: Path
    """Where pictures go."""
    scratch: Path
    """A folder of this part's own, removed afterwards."""

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.float32 if self.dry_run else torch.bfloat16

    def require_device(self) -> None:
        """Make sure that what follows runs on a GPU, or is a dry run.

        Raises:
            PartFailedError: torch sees no GPU; some parts would pass without having met one.
        """
        import torch

        if not self.dry_run and not torch.cuda.is_available():
            raise PartFailedError(
                f"torch {torch.__version__} sees no GPU: run this where there is one, or with "
                "--dry-run",
                {},
            )

    def shape(self, name: str) -> str:
        """The shape that stands for a model: itself, or `tiny` in a dry run."""
        return "tiny" if self.dry_run else name

    def random_model(self, name: str) -> PreTrainedModel:
        """A model of a shape, made on the device."""
        from benchmarks.gpu.shapes import random_model

        return random_model(self.shape(name), self.device, self.dtype)

    def folder(self) -> Path:
        """A folder with SmolLM2: the one given, or one of random weights of its shape."""
        if self.model is not None and not self.dry_run:
            return self.model
        import torch

        from benchmarks.gpu.shapes import byte_tokenizer, random_model

        made = self.scratch / "model"
        if not made.exists():
            model = random_model(self.shape("smollm2-135m"), torch.device("cpu"), torch.float32)
            model.save_pretrained(made)
            byte_tokenizer().save_pretrained(made)
        return made

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.dry_run:
            import torch

            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Wall-clock seconds of one call, the device's work included."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def peak_gib(self) -> float | None:
        """Most memory of the device that tensors took since `fresh_memory`; None on a CPU."""
        if self.dry_run:
            return None
        import torch

        return torch.cuda.max_memory_allocated() / 2**30

    def fresh_memory(self) -> None:
        """Give back what is cached and start counting anew."""
        if not self.dry_run:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


class PartFailedError(Exception):
    """A part ran and found something wrong; it carries what was measured all the same."""

    def __init__(self, reason: str, figures: dict[str, Any]) -> None:
        super().__init__(reason)
        self.figures = figures


def require(figures: dict[str, Any], **conditions: bool) -> dict[str, Any]:
    """The figures, if all conditions hold.

    Raises:
        PartFailedError: some do not; the message names them.
    """
    broken = [name for name, holds in conditions.items() if not holds]
    if broken:
        raise PartFailedError("does not hold: " + ", ".join(broken), figures)
    return figures
