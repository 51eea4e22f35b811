"""The value function of PPO: a small network on the frozen base's final hidden states.

It never touches the base. Its input is detached, so that the value loss teaches the prompt nothing:
a prompt of a few thousand numbers would otherwise be pulled towards states whose value is easy to
predict. The head has its own learning rate because its parameters have another scale than a prompt.

Letters: d model width, h hidden units.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import skip_init

from rlprompt.settings import Settings


class ValueHeadSettings(Settings):
    """The value function on the base's final hidden states."""

    hidden_size: int | None = Field(default=64, ge=1, le=65536)
    """Units of the one hidden layer; null = a linear function of the hidden state."""
    lr: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate (AdamW); it follows warm-up and schedule of `training.optimizer`."""


class ValueHead(nn.Module):
    """[..., d] hidden states -> [...] values; all zero before the first update.

    The input is normalised to unit scale without parameters, because bases differ in the scale of
    their hidden states by orders of magnitude.
    """

    def __init__(
        self,
        width: int,
        hidden_size: int | None,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Draw the parameters from a generator of their own.

        Args:
            width: the width of a hidden state, d.
            hidden_size: the width of the inner layer, h; None = no inner layer, a linear head.
            seed: the seed of the parameters; the global generator is left alone.
            device: where the head lives.
            dtype: the dtype of the parameters.
        """
        super().__init__()
        self._width = width
        inner = width if hidden_size is None else hidden_size
        # skip_init: a layer would draw its parameters from the global generator.
        self.inner = None if hidden_size is None else skip_init(nn.Linear, width, inner)
        self.outer = skip_init(nn.Linear, inner, 1)
        with torch.no_grad():
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)
            if self.inner is not None:
                generator = torch.Generator().manual_seed(seed)
                self.inner.weight.normal_(0.0, width**-0.5, generator=generator)
                nn.init.zeros_(self.inner.bias)
        self.to(device=device, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values [...] of hidden states [..., d], which get no gradient."""
        dtype = self.outer.weight.dtype
        states = nn.functional.layer_norm(hidden.detach().to(dtype), (self._width,))
        if self.inner is not None:
            states = torch.tanh(self.inner(states))
        values: Tensor = self.outer(states).squeeze(-1)
        return values
