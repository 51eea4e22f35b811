"""A soft prompt: trainable embeddings in the system slot.

Lester et al., 2021 (arXiv 2104.08691) put trainable embeddings before the whole input. Here they
stand inside the system turn, between the template's own tokens.

Letters: m virtual tokens, d model width, V vocabulary.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rlprompt.errors import InputError
from rlprompt.prompts.base import Conditioner, Prompt
from rlprompt.settings import Settings
from rlprompt.types import PrefixKV


class SoftSettings(Settings):
    """A soft prompt: m trainable embeddings in the system slot."""

    type: Literal["soft"] = "soft"
    """Representation."""
    num_virtual_tokens: int | None = Field(default=16, ge=1, le=4096)
    """m, the number of trainable embeddings; null = as many as `init_text` has tokens."""
    init_text: str | None = "You are a helpful assistant."
    """Text whose embeddings the prompt starts from, repeated or cut to m tokens; null = random
    vocabulary embeddings."""
    max_norm_ratio: float | None = Field(default=1.5, gt=0.0)
    """Trust region: after each update a token longer than this multiple of the median vocabulary
    embedding is scaled back to it; null = no limit."""

    @model_validator(mode="after")
    def _length_is_known(self) -> SoftSettings:
        if self.num_virtual_tokens is None and not (self.init_text or "").strip():
            raise ValueError("num_virtual_tokens is null, which needs an init_text to count")
        return self


class SoftPrompt(Prompt):
    """Embeddings [m, d] in float32, whatever the base's dtype."""

    kind: ClassVar[str] = "soft"

    def __init__(
        self, embeddings: Tensor, init_text: str = "", max_norm: float | None = None
    ) -> None:
        """Start from embeddings [m, d], which are copied.

        Args:
            embeddings: the start.
            init_text: where they come from, for the record.
            max_norm: longest token that `constrain` leaves alone. Tokens that start longer may stay
                as long as they are.
        """
        self.embeddings = nn.Parameter(embeddings.detach().float().clone())
        self.init_text = init_text
        self._start = self.embeddings.detach().clone()
        self._max_norm = (
            None if max_norm is None else self._start.norm(dim=1, keepdim=True).clamp_min(max_norm)
        )

    @property
    def num_virtual_tokens(self) -> int:
        """The number of trainable embeddings, m."""
        return int(self.embeddings.shape[0])

    @classmethod
    def create(cls, settings: SoftSettings, conditioner: Conditioner, seed: int) -> SoftPrompt:
        """A fresh prompt.

        With `init_text` and m = its token count, the fresh prompt is exactly that text. A longer m
        repeats the text's embeddings, a shorter one cuts them, as PEFT does. Without a text, m
        embeddings of random vocabulary tokens are drawn by `seed`.

        Raises:
            InputError: the text has no tokens.
        """
        length = settings.num_virtual_tokens
        ratio = settings.max_norm_ratio
        max_norm = None if ratio is None else ratio * conditioner.embedding_norm()
        if settings.init_text is None:
            assert length is not None  # settings refuse both being null
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randint(conditioner.vocab_size, (length,), generator=generator)
            return cls(conditioner.embed(drawn.tolist()), max_norm=max_norm)
        ids = conditioner.slot_ids(settings.init_text)
        if not ids:
            raise InputError("prompt.init_text is empty; write a text, or null for a random start")
        length = len(ids) if length is None else length
        tiled = [ids[i % len(ids)] for i in range(length)]
        return cls(conditioner.embed(tiled), settings.init_text, max_norm)

    def prefix(self, conditioner: Conditioner) -> PrefixKV:
        """Head and embeddings, prefilled; gradients reach the embeddings."""
        head = conditioner.embed(list(conditioner.head_ids))
        slot = self.embeddings.to(device=head.device, dtype=head.dtype)
        return conditioner.prefill(torch.cat([head, slot]))

    def parameters(self) -> list[nn.Parameter]:
        """The embeddings."""
        return [self.embeddings]

    @torch.no_grad()
    def constrain(self) -> None:
        """Scale tokens that have grown past the trust region back to its border."""
        if self._max_norm is None:
            return
        norms = self.embeddings.norm(dim=1, keepdim=True)
        limit = self._max_norm.to(norms.device)
        self.embeddings.mul_((limit / norms.clamp_min(1e-12)).clamp_max(1.0))

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Mean token norm, and mean distance of tokens from their start relative to its norm."""
        start = self._start.to(self.embeddings.device)
        drift = (self.embeddings - start).norm(dim=1) / start.norm(dim=1).clamp_min(1e-12)
        norm = self.embeddings.norm(dim=1).mean()
        return {"norm": float(norm), "drift_from_init": float(drift.mean())}

    def state_dict(self) -> dict[str, Tensor]:
        """`embeddings`, a float32 [m, d] copy on the CPU."""
        return {"embeddings": self.embeddings.detach().cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over `embeddings`; see the base class."""
        if set(state) != {"embeddings"} or state["embeddings"].shape != self.embeddings.shape:
            given = {name: tuple(t.shape) for name, t in state.items()}
            raise ValueError(f"expected embeddings {tuple(self.embeddings.shape)}, given {given}")
        with torch.no_grad():
            self.embeddings.copy_(state["embeddings"])
