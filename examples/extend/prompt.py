"""A prompt representation of your own: a soft prompt that moves in few directions.

The embeddings are those of a text plus a product of two small matrices (after Xiao et al., 2023,
arXiv 2310.10094): m * r + r * d numbers are trained in place of m * d.

Letters: m virtual tokens, d model width, r rank.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

import rlprompt.extend as rl


class LowRankSettings(rl.PromptSettings):
    """What a recipe may say."""

    num_virtual_tokens: int | None = Field(default=None, ge=1)
    """m, to which the text is repeated or cut; null = as many as it has."""
    init_text: str = "You are a helpful assistant."
    """Text that the prompt starts from, exactly."""
    rank: int = Field(default=2, ge=1)
    """r, the directions that all tokens share."""


class LowRankPrompt(rl.SlotPrompt):
    """Embeddings [m, d] = start + left [m, r] @ right [r, d]; `right` starts at zero."""

    kind: ClassVar[str] = "low_rank"
    Settings = LowRankSettings

    def __init__(self, start: Tensor, left: Tensor, right: Tensor, init_text: str) -> None:
        """Take over the tensors, which artifacts and checkpoints hold too."""
        self.start, self.init_text = start, init_text
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)

    @classmethod
    def create(
        cls,
        settings: LowRankSettings,
        conditioner: rl.Conditioner,
        seed: int,
        load: rl.Loader = rl.load_nothing,
        before: rl.PrefixKV | None = None,
    ) -> Self:
        """A fresh prompt: exactly its text."""
        del load, before  # it starts from no artifact, and means the same wherever it stands
        fresh = rl.fresh_start(settings.init_text, settings.num_virtual_tokens, conditioner, seed)
        start, r = conditioner.embed(fresh.token_ids).float(), settings.rank
        left = torch.randn(len(start), r, generator=torch.Generator().manual_seed(seed)) / r**0.5
        return cls(start, left.to(start), start.new_zeros(r, start.shape[1]), fresh.text)

    @classmethod
    def restore(cls, saved: rl.SavedPrompt) -> Self:
        """The prompt of an artifact, whose tensors are those of `state_dict`."""
        own = saved.tensors
        return cls(own["start"], own["left"], own["right"], saved.init_text)

    def extend(self, conditioner: rl.Conditioner, before: rl.PrefixKV) -> rl.PrefixKV:
        """Keys and values of `before` and of the embeddings behind it, differentiable."""
        like = conditioner.embed([])
        embeddings = self.start.to(self.left.device) + self.left @ self.right
        return conditioner.prefill(embeddings.to(device=like.device, dtype=like.dtype), before)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [self.left, self.right]

    def gated_parameters(self) -> list[nn.Parameter]:
        """`left` has no gradient while `right` is zero; that of all others must not be zero."""
        return [self.left]

    def scale(self, conditioner: rl.Conditioner) -> float:
        """What a relative learning rate is relative to: the size of an embedding's entry."""
        return conditioner.embedding_rms()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that it is, copied to the CPU."""
        own = {"start": self.start, "left": self.left, "right": self.right}
        return {name: tensor.detach().cpu().clone() for name, tensor in own.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        rl.check_state(state, self.state_dict())
        self.start = state["start"].clone()
        self.left.copy_(state["left"])
        self.right.copy_(state["right"])

    def check(self, conditioner: rl.Conditioner) -> None:
        """Refuse a base of another width."""
        if self.start.shape[1] != conditioner.hidden_size:
            raise ValueError(f"width {self.start.shape[1]}, the base has {conditioner.hidden_size}")
